"""Computing steps side by side, in processes that live on."""

import contextlib
import io
import multiprocessing
import os
import runpy
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool

from tqdm import tqdm

from mvrepro.determinism import set_environment
from mvrepro.errors import UserError, explain_os_error
from mvrepro.files import LOCAL, RESULTS, ROOT, TEMPORARY, display, lock, write_atomic
from mvrepro.pipeline.freshness import keep_committed
from mvrepro.pipeline.plan import Step, network_of
from mvrepro.terminal import deaf

MOST_JOBS = 4  # a run takes about 450 MiB
AGAIN = "What was computed before is kept: the same command goes on from there."


@contextlib.contextmanager
def only_one() -> Iterator[None]:
    """Hold the project for one runner; a second one waits. The lock dies with its process."""
    try:
        LOCAL.mkdir(parents=True, exist_ok=True)
        file = (LOCAL / "lock").open("a")
    except OSError as error:
        raise explain_os_error(error, f"lock {display(LOCAL)}") from None
    with file:
        with contextlib.suppress(OSError):  # a file system without locks
            if not lock(file, wait=False):
                print("another `make reproduce` is at work in this folder; waiting for it to end", flush=True)
                lock(file)
        yield


def compute(
    steps: Sequence[Step], skip: Callable[[Step], bool], *, jobs: int | None = None, capped: bool = True
) -> Iterator[Step]:
    """Compute steps side by side in processes that live on, in their order, each when what it needs is done; yields
    each as it ends. What was done stays done, whatever happens to the others.

    skip: is asked of a step when it could begin; capped: where a run is portable, with the caps of
    mvrepro.determinism.
    Raises UserError when a step fails, when a process dies, and for steps whose inputs changed meanwhile.
    """
    write_atomic(probe := RESULTS / f"{TEMPORARY}probe", b"")  # say at once, not after minutes, what can't be written
    probe.unlink()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    jobs = jobs or min(cores, MOST_JOBS)
    behind = {step.name: {o.name for o in steps if o is not step and step.needs(o)} for step in steps}
    waiting, done, moved = list(steps), set[str](), list[str]()
    running: dict[Future[None], tuple[Step, str]] = {}
    bar, pools = tqdm(total=len(steps), unit="step", disable=None), [_workers(jobs, False), _workers(jobs, True)]
    try:
        while waiting or running:
            ready = [s for s in waiting if behind[s.name] <= done]
            if not ready and not running:
                raise UserError(f"dvc.yaml goes in a circle: {', '.join(s.name for s in waiting)} wait for each other")
            for step in ready[: jobs - len(running)]:
                waiting.remove(step)
                if skip(step):
                    done.add(step.name)
                    bar.update()
                else:
                    pool, before = pools[capped and (step.config is None or step.config.portable)], step.inputs()
                    try:
                        with deaf():  # the workers, which `submit` starts: who started them ends them
                            running[pool.submit(compute_here, step)] = step, before
                    except BrokenProcessPool:  # one died since, and its step has not been heard of yet
                        raise _died([step, *(s for s, _ in running.values())]) from None
            finished = wait(running, return_when=FIRST_COMPLETED).done if running else set()
            # Those that failed last: what ended in the same instant is done and stays done.
            for future in sorted(finished, key=lambda f: f.exception() is not None):
                step, before = running.pop(future)
                try:
                    future.result()
                except UserError as error:
                    raise UserError(f"{step.name}: {error}\n{AGAIN}") from None
                except BrokenProcessPool:
                    raise _died([step, *(s for s, _ in running.values())]) from None
                done.add(step.name)
                bar.update()
                bar.set_postfix_str(step.name)
                if bar.disable:
                    print(f"[{len(done)}/{len(steps)}] {step.name}", flush=True)
                if step.inputs() == before:
                    yield step
                else:
                    moved.append(step.name)
    except BaseException:
        for child in multiprocessing.active_children():
            child.terminate()
        raise
    finally:
        for pool in pools:
            pool.shutdown()
        bar.close()
    if moved:
        raise UserError(f"what {', '.join(moved)} is made from changed while it was: run the same command again")


def compute_here(step: Step) -> None:
    """Train the run, or call the stage's `python -m MODULE …`, in this process, where the libraries are loaded."""
    if step.config:
        from mvrepro.training import loop

        loop.check_used(step.config, step.given)
        begin = network_of(step.base) if step.base else None
        loop.run(step.config, step.writes[0], keep=network_of(step.config) if step.keeps else None, begin=begin)
        keep_committed(step.writes[0])
        return
    sys.argv, said = shlex.split(step.command)[2:], io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        except SystemExit as end:
            if end.code:
                raise UserError(said.getvalue().strip()) from None


def _died(steps: Iterable[Step]) -> UserError:
    names = ", ".join(step.name for step in steps)
    return UserError(f"a process was killed, or ran out of memory, at {names}\n{AGAIN}")


def _workers(jobs: int, capped: bool) -> ProcessPoolExecutor:
    set_environment(threads=1)
    return ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _begin, (capped,))


def _begin(capped: bool) -> None:
    """What a worker does first: it prints to .mvrepro/log, and ends when its parent does, however that ended."""
    set_environment(threads=1, portable=capped)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # for good: the parent ends its workers
    os.chdir(ROOT)
    LOCAL.mkdir(parents=True, exist_ok=True)
    with (LOCAL / "log").open("ab") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    tqdm.set_lock(threading.RLock())  # its own is a semaphore that outlives a process that is killed
    parent = multiprocessing.parent_process()

    def follow() -> None:
        if parent:
            parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
