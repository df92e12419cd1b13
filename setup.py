"""All is in pyproject.toml but this: the profiles that `train` knows lie beside the package, and travel inside it."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithProfiles(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode:  # which sees params.yaml where it lies
            self.copy_file("params.yaml", str(Path(self.build_lib, "mvrepro", "params.yaml")))


setup(cmdclass={"build_py": BuildWithProfiles})
