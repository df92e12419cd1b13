"""Fetching LFW from its public mirror: the original photos and the official lists of pairs.

Addresses and sha256 are those that scikit-learn publishes (sklearn/datasets/_lfw.py: ARCHIVE and TARGETS). They hold
the original photos, not the deep-funneled ones, and no lists of BLUFR (cbsr.ia.ac.cn/users/scliao/projects/blufr).
"""

import tarfile
from pathlib import Path

from mvrepro.errors import UserError
from mvrepro.images.storage import new_set

MIRROR = "https://ndownloader.figshare.com/files/"
LFW = {  # file: number at the mirror, sha256
    "pairsDevTrain.txt": ("5976012", "1d454dada7dfeca0e7eab6f65dc4e97a6312d44cf142207be28d688be92aabfa"),
    "pairsDevTest.txt": ("5976009", "7cb06600ea8b2814ac26e946201cdb304296262aad67d046a16a7ec85d0ff87c"),
    "pairs.txt": ("5976006", "ea42330c62c92989f9d7c03237ed5d591365e89b3e649747777b70e692dc1592"),
    "lfw.tgz": ("5976018", "055f7d9c632d7370e6fb4afc7468d40f970c34a80d4c6f50ffec63f5a8d536c0"),
}


def fetch_lfw(out: Path, files: dict[str, tuple[str, str]] = LFW) -> Path:
    """The lists into out/lfw, the photos (about 180 MB) into out/raw/lfw/NAME/…; what is there already and right is
    not fetched again. Returns the folder of the photos. Raises UserError without network, or where a file is not
    what its sha256 says."""
    photos = out / "raw" / "lfw"
    for name, (number, sha256) in files.items():
        if name != "lfw.tgz":
            _retrieve(MIRROR + number, sha256, out / "lfw", name)
        elif not photos.is_dir():
            _unpack(_retrieve(MIRROR + number, sha256, out / "raw", name), photos)
    return photos


def _retrieve(url: str, sha256: str, folder: Path, name: str) -> Path:
    try:
        import pooch
    except ImportError:
        raise UserError('fetching needs pooch: pip install "mvrepro[fetch]"') from None
    try:
        return Path(pooch.retrieve(url, f"sha256:{sha256}", fname=name, path=folder, progressbar=True))
    except ValueError as error:  # pooch's for a wrong hash; it has removed what it fetched
        raise UserError(f"{url} is not the {name} that was expected: {error}") from None
    except OSError as error:  # those of requests and urllib, too
        reason = f"{type(error).__name__}: {error}"
        raise UserError(
            f"could not fetch {name} from {url} ({reason[:200]}). Without that mirror, get the file elsewhere and "
            f"place it at {folder / name}: it is taken when its sha256 is {sha256}"
        ) from None


def _unpack(archive: Path, target: Path) -> None:
    """The folder lfw/ of the archive becomes target, whole or not at all."""
    try:
        with new_set(target) as aside, tarfile.open(archive) as tar:
            tar.extractall(aside, filter="data")
            for child in (aside / "lfw").iterdir():
                child.rename(aside / child.name)
            (aside / "lfw").rmdir()
    except (tarfile.TarError, EOFError) as error:
        raise UserError(f"{archive}: not a whole tar file: {error}") from None
