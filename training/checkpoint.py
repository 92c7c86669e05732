"""A run's state on disk: what it was given, how far it came, and what resumes it bit for bit."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from common.fields import Number, check, parse_number, read_field
from common.files import MARK, InputError, read_json, read_text, say, warn, write_json
from common.printable import shown
from common.tensors import dtype_name, read_metadata, read_safetensors, write_safetensors

NOT_THE_RUN = ("resume", "save_every", "tensorboard", "device", "show_all")  # may differ on resuming
# What an optimizer keeps of each parameter that ever had a gradient; torch names them.
STATE = {torch.optim.AdamW: ("step", "exp_avg", "exp_avg_sq"), torch.optim.Muon: ("momentum_buffer",)}
Params = dict[str, torch.Tensor]  # {name: trained tensor}
Optimizers = list[torch.optim.Optimizer]


class Checkpoint:
    """RUN/checkpoint.safetensors: step, trained tensors, optimizer state, RNG.

    config.json and log.csv lie beside it. A finished run leaves config.json with "finished": true
    and "wrote", the files that it made, and no checkpoint. `kept` {name: tensor} is further state of
    the run, to be set before fit(): saved beside the weights, and restored in place.
    """

    def __init__(self, folder: Path | str, args: Any, bound: dict[str, str] | None = None):
        """`args` is a loop.Run; `bound` {what: hash} of base, adapters and data: together they say which
        run it is.

        Raises InputError where an unfinished run or, on resuming, one of other input is here.
        """
        self.folder = Path(folder)
        self.file = self.folder / "checkpoint.safetensors"
        self.config = {k: v for k, v in asdict(args).items() if k not in NOT_THE_RUN}
        self.config["bound"] = bound or {}
        self.step = 0
        self.finished = False
        self.rows = []
        self.kept = {}
        if self.file.exists() and not MARK.items() <= read_metadata(self.file).items():
            raise InputError(f"{self.file}: not a checkpoint that train.py made: move it elsewhere")
        file = self.folder / "config.json"
        if file.exists():
            known = read_json(file)
            known["finished"] = read_field(file, known, "finished", bool, False)
            known["wrote"] = read_field(file, known, "wrote", [str], [])
            known["bound"] = read_field(file, known, "bound", {str: str}, {})
            if known["finished"] and not known["wrote"]:
                raise InputError(f"{file}: wrote is empty, expected the files of a finished run")
            if known["finished"] or self.file.exists():  # else there is nothing to lose
                self._check_known(known, args.resume)

    def _check_known(self, known, resume):
        """A run is here already: resume it, or refuse to overwrite it."""
        finished = known.pop("finished")
        wrote = known.pop("wrote")
        if finished:  # killed before finish() could remove it
            self.file.unlink(missing_ok=True)
        if not resume and not finished:
            message = "an unfinished run is here: go on with --resume, or remove the folder"
            raise InputError(f"{self.folder}: {message}")
        if not resume:
            return warn(f"{self.folder}: a finished run is here: training again replaces what it wrote")
        if differ := differences(known, self.config):
            file = self.folder / "config.json"
            found = "; ".join(differ)
            raise InputError(f"{file}: can't resume with other options or data: {found}")
        gone = [name for name in wrote if not (self.folder / name).exists()]
        if gone:
            file = os.path.normpath(self.folder / gone[0])
            warn(f"{file}: a finished run wrote it, and it is gone: training again")
        self.finished = finished and not gone

    def write_config(self, finished: bool = False, wrote: Iterable[Path] = ()) -> None:
        """Writes RUN/config.json."""
        files = sorted(os.path.relpath(file, self.folder) for file in wrote)
        write_json(self.folder / "config.json", self.config | {"finished": finished, "wrote": files})

    def load(self, params: Params, optimizers: Optimizers) -> None:
        """Restores the run's state, if there is one, into `params` and `optimizers`."""
        if not self.file.exists():
            return
        tensors, metadata = read_safetensors(self.file)
        expected = self._expected(params, optimizers)
        self._check_tensors(tensors, metadata.get("tensors"), expected)
        steps = Number(int, 1, self.config["steps"])
        self.step = parse_number(f"{self.file}: step", metadata.get("step", ""), steps)
        for name, tensor in tensors.items():
            if name.startswith("step."):
                check(f"{self.file}: {name}", tensor.item(), Number(float, 1, self.step))
        for name, param in params.items():
            param.data.copy_(tensors[f"param.{name}"])
        for name, tensor in self.kept.items():
            tensor.copy_(tensors[f"kept.{name}"])
        for name, param, optimizer in states(params, optimizers):
            optimizer.state[param] = {}
            for kind in STATE[type(optimizer)]:
                if (tensor := tensors.get(f"{kind}.{name}")) is not None:
                    place = "cpu" if kind == "step" else param.device  # where torch has them
                    optimizer.state[param][kind] = tensor.to(place, copy=True)
        self._set_rng(tensors)
        self.rows = self._logged()

    def _expected(self, params, optimizers):
        """{name of a tensor: one like it}, of all that a checkpoint may hold."""
        expected = {"rng": torch.get_rng_state()}
        for name, param in params.items():
            expected[f"param.{name}"] = param
        for name, tensor in self.kept.items():
            expected[f"kept.{name}"] = tensor
        for name, param, optimizer in states(params, optimizers):
            for kind in STATE[type(optimizer)]:
                expected[f"{kind}.{name}"] = torch.zeros(()) if kind == "step" else param
        return expected

    def _check_tensors(self, tensors, count, expected):
        """Raises InputError where a tensor is missing, is another's, or has another shape or dtype."""

        def refuse(found):
            why = "damaged, or of an earlier version"
            raise InputError(f"{self.file}: {found}: {why}: remove {self.folder} to train anew")

        for name in ["rng", *(name for name in expected if name.startswith(("param.", "kept.")))]:
            if name not in tensors:
                refuse(f"no tensor {name}")
        for name, tensor in tensors.items():
            if name == "cuda_rng":
                continue
            if name not in expected:
                refuse(f"unknown tensor {shown(name)}")
            like = expected[name]
            if tensor.shape != like.shape or tensor.dtype != like.dtype:
                found = f"{name} is {tuple(tensor.shape)} in {dtype_name(tensor.dtype)}"
                refuse(f"{found}, expected {tuple(like.shape)} in {dtype_name(like.dtype)}")
        if count != str(len(tensors)):
            refuse(f"{len(tensors)} tensors, its metadata say {shown(count)}")

    def _set_rng(self, tensors):
        try:
            torch.set_rng_state(tensors["rng"].clone())
            if "cuda_rng" in tensors and torch.cuda.is_available():
                torch.cuda.set_rng_state(tensors["cuda_rng"].clone())
        except (RuntimeError, TypeError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(
                f"{self.file}: the random state is damaged ({reason}): remove {self.folder}"
            ) from None

    def _logged(self):
        """The rows of log.csv up to the checkpoint's step, which the log may be ahead of."""
        file = self.folder / "log.csv"
        if not file.exists():
            return []
        header, *lines = read_text(file).split("\n")
        lines += [""] * self.step  # where it is too short
        rows = [line.split(",") for line in lines[: self.step]]
        for step, row in enumerate(rows, 1):
            if row[0] != f"{step:.6g}" or len(row) != header.count(",") + 1:
                found = f"{shown(','.join(row))}, expected step {step}"
                raise InputError(f"{file}:{step + 1}: {found}: damaged: remove it to go on without")
        return rows

    def save(self, step: int, params: Params, optimizers: Optimizers) -> None:
        """Writes RUN/checkpoint.safetensors after `step` steps."""
        tensors = {"rng": torch.get_rng_state()}
        if torch.cuda.is_initialized():
            tensors["cuda_rng"] = torch.cuda.get_rng_state()
        for name, param in params.items():
            tensors[f"param.{name}"] = param.data
        for name, tensor in self.kept.items():
            tensors[f"kept.{name}"] = tensor
        for name, param, optimizer in states(params, optimizers):
            for kind, value in optimizer.state[param].items():
                tensors[f"{kind}.{name}"] = value
        about = {"step": str(step), "tensors": str(len(tensors))}
        write_safetensors(self.file, tensors, MARK | about)

    def finish(self, written: Path | str, files: Iterable[Path]) -> None:
        """Marks the run as finished with `files`, and says that it wrote them, as `written`."""
        self.write_config(finished=True, wrote=files)
        self.file.unlink(missing_ok=True)
        say(f"wrote {written}")


def differences(was: dict, now: dict) -> list[str]:
    """What differs between two runs' options, and between the hashes of what they are bound to."""
    found = []
    for name in sorted((was.keys() | now.keys()) - {"bound"}):
        if was.get(name) != now.get(name):
            found.append(f"{name} was {was.get(name)!r}, now {now.get(name)!r}")
    was = was.get("bound", {})
    now = now["bound"]
    for name in sorted(was.keys() | now.keys()):
        if was.get(name) != now.get(name):
            how = "is new" if name not in was else "is gone" if name not in now else "has changed"
            found.append(f"{name} {how}")
    return found


def states(params: Params, optimizers: Optimizers) -> Iterator[tuple]:
    """(name, parameter, its optimizer) of each parameter."""
    names = {param: name for name, param in params.items()}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for param in group["params"]:
                yield names[param], param, optimizer
