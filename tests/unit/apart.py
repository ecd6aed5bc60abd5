"""The device `apart` (apart.cpp), built where there is a C++ compiler, and what was counted on it.

It shows on any machine what breaks first on a GPU: a tensor on the wrong side, and a step that
waits for the device. The library is built once for a source and a torch, into `.pytest_cache`.
"""

import functools
import shutil
import subprocess
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from types import ModuleType

import torch
from torch.utils import cpp_extension

from pipeline import storage
from tests import needs

SOURCE = Path(__file__).with_suffix(".cpp")


@dataclass(frozen=True)
class Traffic:
    """What has crossed between host and device, and how often the host has waited for the device.

    A copy to the device waits unless it is `non_blocking`; one to the host does, too, unless it
    goes into pinned memory; a number that Python reads, or a shape that depends on data, always.
    """

    to_device: int
    to_host: int
    waits: int

    def __sub__(self, before: "Traffic") -> "Traffic":
        return Traffic(
            self.to_device - before.to_device,
            self.to_host - before.to_host,
            self.waits - before.waits,
        )


def traffic() -> Traffic:
    """Since the start of the process."""
    return Traffic(*torch.ops.apart.counts())


@functools.cache
def load() -> None:
    """Make the device known to torch, by the name `apart`; skips the test where it cannot."""
    compiler = cpp_extension.get_cxx_compiler()
    if shutil.which(compiler) is None:
        needs.COMPILER.skip()
    torch.ops.load_library(str(_built(compiler)))
    torch.utils.rename_privateuse1_backend("apart")
    torch._register_device_module("apart", _module())
    torch.utils.generate_methods_for_privateuse1_backend(for_storage=False)


def _built(compiler: str) -> Path:
    command = [compiler, "-std=c++20", "-O1", "-fPIC", "-shared", str(SOURCE)]
    command += [f"-I{path}" for path in cpp_extension.include_paths()]
    command += [f"-L{path}" for path in cpp_extension.library_paths()]
    command += ["-ltorch", "-ltorch_cpu", "-lc10"]
    made_of = (torch.__version__, *command, SOURCE.read_text())
    folder = Path(__file__).parents[2] / ".pytest_cache" / "apart"
    library = folder / f"{sha256(repr(made_of).encode()).hexdigest()[:16]}.so"
    folder.mkdir(parents=True, exist_ok=True)
    with storage.exclusive(str(folder / "lock")):
        if not library.exists():
            unfinished = library.with_suffix(".part")
            done = subprocess.run([*command, "-o", str(unfinished)], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            unfinished.rename(library)
    return library


def _module() -> ModuleType:
    """What torch asks of `torch.apart`."""
    module = ModuleType("torch.apart")
    generator = torch.Generator("apart")
    functions = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "_is_in_bad_fork": lambda: False,
        "manual_seed_all": generator.manual_seed,
        "get_rng_state": lambda device="apart": generator.get_state(),
        "set_rng_state": lambda state, device="apart": generator.set_state(state),
        "get_amp_supported_dtype": lambda: [torch.bfloat16, torch.float16],
    }
    for name, function in functions.items():
        setattr(module, name, function)
    return module
