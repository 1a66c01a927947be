"""Times in a process of their own: a kernel that breaks the device, crashes or hangs costs its row, and no other's.

`Times` starts the process (this file as a program), which says line by line what it begins and what it has measured,
and where it ends before its time starts another that goes on behind the peer that was at work, and leaves this one out
of the rest of its operator.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from llmengine.ops.registry import load
from llmengine.roofline.cases import OPERATORS, SHAPES, cases
from llmengine.roofline.ceilings import NAMES, Ceilings, measure_ceilings
from llmengine.roofline.clock import Clock
from llmengine.roofline.machine import ROOT, machine
from llmengine.roofline.measure import lines, measure

STUCK = 60.0  # seconds after which a peer is taken to hang: compilers need half of it
ENDING = 20.0  # in which a process that is killed must have ended


# ---- the process that times ------------------------------------------------------------------------------------------


def time_here(smoke: bool, behind: dict[str, Any], goals: bool = False) -> int:
    """The process that times: writes a line of JSON for the machine and its ceilings, for each peer that it begins and
    for each row; ends with 3 where an error has left the device unusable.

    smoke, goals: tiny shapes on the CPU; those that goals name, each also compiled.
    behind: "ceilings" of the process before; "operator" and "case", the number of its case in it, to begin with;
        "begun": (pass, peer) of that case, and "without": peers, to leave out of that operator.
    """
    device, dtype = ("cpu", torch.float16) if smoke else ("cuda", torch.bfloat16)
    backends = [b for b in ("cuda", "triton") if load(b).unavailable is None]
    clock = Clock(device, 0.0, alone=True)
    if "ceilings" not in behind:
        ceilings = measure_ceilings(clock, [dtype], smoke)
        found = {b: load(b).unavailable or "usable" for b in ("cuda", "triton")}
        say({"machine": machine(device), "backends": found, "ceilings": ceilings.as_json()})
    else:
        ceilings = ceilings_of(behind["ceilings"])
    chosen = "goals" if goals else "cuda"
    operators = [name for name, (shapes, _) in OPERATORS.items() if SHAPES[chosen].get(shapes)]
    if smoke:
        operators.remove("linear")  # Triton has none: on a GPU, CUDA's is timed
    for operator in operators[operators.index(behind.get("operator", operators[0])) :]:
        new: dict[str, Any] = {"case": 0, "begun": [], "without": []}
        resumed = behind if operator == behind.get("operator") else new
        row, first = {"operator": operator, "case": "", "dtype": NAMES[dtype]}, ""
        try:
            for number, case in enumerate(cases("small" if smoke else chosen, device, dtype, [operator])):
                first = first or case.name.split()[0]
                if number < resumed["case"]:
                    continue
                row["case"] = case.name
                begun = resumed["begun"] if number == resumed["case"] else []
                wanted = announced(row, number, begun, resumed["without"])
                # it takes longer than all others together
                compiled = not smoke and (goals or case.name.split()[0] == first)
                for told in measure(case, clock, ceilings, backends=backends, compiled=compiled, wanted=wanted):
                    say({"row": told})
                    if "error" in told and not usable(clock):
                        return 3
        except Exception as error:  # no peer's: a case that cannot be made
            say({"row": row | {"peer": "llmengine", "pass": "after that case", "error": f"{operator}: {error}"[:300]}})
            if not usable(clock):
                return 3
    say({"finished": True})
    return 0


def announced(row: dict[str, Any], number: int, begun: list, without: list) -> Callable[[str, str], bool]:
    """Whether a peer is to run in a pass of a case; then it is said that it begins."""
    here = dict(row)

    def wanted(which: str, peer: str) -> bool:
        if [which, peer] in begun or peer in without:
            return False
        say({"begun": here | {"peer": peer, "pass": which}, "number": number})
        return True

    return wanted


def usable(clock: Clock) -> bool:
    try:
        clock.wait()
    except RuntimeError:
        return False
    return True


def say(event: dict[str, Any]) -> None:
    print(json.dumps(event), flush=True)


def ceilings_of(told: dict[str, Any]) -> Ceilings:
    dtypes = {name: dtype for dtype, name in NAMES.items()}
    return Ceilings(told["gbytes_per_s"], {dtypes[name]: rate for name, rate in told["tflops"].items()})


# ---- who starts it ---------------------------------------------------------------------------------------------------


def started(
    command: list[str], folder: Path = ROOT, environment: dict[str, str] | None = None
) -> subprocess.Popen[str]:
    """A command at the head of a group of processes, and all that it writes."""
    env = os.environ | (environment or {})
    return subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=env,
        start_new_session=True,
    )  # fmt: skip


def end(run: subprocess.Popen[str]) -> None:
    """Ends a command and all that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(run.pid, signal.SIGKILL)


def events(run: subprocess.Popen[str], left: Callable[[], float], tail: deque[str]) -> Iterator[dict[str, Any]]:
    """What a process that times says, until it ends, or is ended: {"stuck": seconds} where it said nothing for so long.
    What it writes besides goes to the tail."""
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        for line in run.stdout or ():
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    while True:
        limit = max(0.0, min(STUCK, left()))
        try:
            line = lines.get(timeout=limit)
        except queue.Empty:
            yield {"stuck": limit}
            return
        if line is None:
            return
        if line.startswith("{"):
            with contextlib.suppress(json.JSONDecodeError):
                yield json.loads(line)
                continue
        tail.append(line.rstrip()[:300])


class Times:
    """Rows of all cases, or of those that there is time for, by as many processes as it takes."""

    def __init__(
        self,
        left: Callable[[], float],
        keep: Callable[[dict], None],
        smoke: bool = False,
        program: list[str] | None = None,
        goals: bool = False,
    ) -> None:
        """
        left: seconds that there are.
        keep: is given the result so far before each case.
        smoke: tiny shapes on the CPU.
        program: what times, but for its last argument.
        goals: the shapes that goals name.
        """
        options = ["--smoke"] * smoke + ["--goals"] * goals
        self.command = program or [sys.executable, "-m", "llmengine.roofline.apart", *options]
        self.left, self.keep = left, keep
        self.result: dict[str, Any] = {"rows": [], "cut": None}
        self.behind: dict[str, Any] = {}
        self.at: dict[str, Any] | None = None  # what was begun and has no row

    def all(self) -> dict[str, Any]:
        while self._more():
            pass
        self.keep(self.result)
        return self.result

    def _more(self) -> bool:
        """A process; whether another shall go on behind it."""
        run, tail = started([*self.command, json.dumps(self.behind)]), deque[str](maxlen=15)
        stuck, over, progress = None, False, False
        try:
            for event in events(run, self.left, tail):
                stuck, over = event.get("stuck"), "finished" in event
                progress |= "begun" in event
                self._take(event)
        finally:
            end(run)
        if over:
            return False
        if self.left() <= 0:
            self.result["cut"] = f"the budget ended at {self._place()}"
            return False
        try:
            status = run.wait(ENDING)
        except subprocess.TimeoutExpired:  # within the driver
            self.result |= {"cut": f"the process cannot be ended at {self._place()}", "broken": True}
            return False
        if not progress:
            self.result |= {"cut": f"timing ended before a case ({status}): {' | '.join(tail)}", "broken": True}
            return False
        why = f"hung: nothing for {stuck:.0f} s" if stuck is not None else f"the process ended with {status}"
        if self.at is not None:
            self._take({"row": self.at | {"error": f"{why}: {tail[-1] if tail else ''}".rstrip(": ")}})
        last = self.result["rows"][-1]  # that of whoever ended the process
        self.behind["without"].append(last["peer"])
        return True

    def _take(self, event: dict[str, Any]) -> None:
        if "ceilings" in event:
            self.result |= event
            self.behind["ceilings"] = event["ceilings"]
            print(event["ceilings"])
        if "begun" in event:
            self._begin(event["begun"], event["number"])
        if "row" in event:
            self.at = None
            self.result["rows"].append(event["row"])
            print("\n".join(lines([event["row"]])), flush=True)

    def _begin(self, row: dict[str, Any], number: int) -> None:
        """A row is begun; of another case than the one before, that one is kept."""
        before = self.behind
        if before.get("operator") != row["operator"]:
            self.behind = {"ceilings": before["ceilings"], "operator": row["operator"], "without": []}
        if self.behind is not before or before.get("case") != number:
            self.behind |= {"case": number, "begun": []}
            self.keep(self.result)
        self.behind["begun"].append([row["pass"], row["peer"]])
        self.at = row

    def _place(self) -> str:
        return f"{self.at['operator']} {self.at['case']}, {self.at['peer']}" if self.at else "a case's making"


if __name__ == "__main__":
    raise SystemExit(time_here("--smoke" in sys.argv, json.loads(sys.argv[-1]), "--goals" in sys.argv))
