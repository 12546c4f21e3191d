"""What of this machine a run would stumble over: its GPUs, disks, packages and open ports."""
from __future__ import annotations

import ipaddress
import os
import re
import shutil
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.findings import Finding, not_asked, ok, one_line, warning, wrong
from pipelines.settings import RunSettings

if TYPE_CHECKING:
    import psutil
    from packaging.requirements import Requirement

DISTRIBUTION = "detr-system"
GIB = 2**30
LITTLE, TOO_LITTLE = 5 * GIB, GIB  # of a disk: a training keeps three checkpoints, and Ray puts there what memory lacks
RAY_FULL = 0.95  # share of a disk: Ray makes no object where more of it is used
FEW_FILES, TOO_FEW_FILES = 10_000, 100
SHARED, MOST_SHARED = 0.3, 10**10  # what Ray wants of the memory to share; so many bytes are enough
RAYS = re.compile(r"^ray::|(^|/)(raylet|gcs_server)(\s|$)|/ray/(dashboard|_private|core|util)/")
MLFLOWS = re.compile(r"\bmlflow[ .](server|ui|models serve)\b")
# In the commands of Ray's processes: where its head is (the head's own may say 0 of its port), and its session.
RAY_AT = re.compile(r" --(?:gcs-)?address=(\S+:[1-9]\d*)")
SESSION = re.compile(r"\bsession_[\d_-]+")
INSTALL = "pip install --constraint constraints.txt --editable ."


def check_gpu(settings: RunSettings) -> list[Finding]:
    """Whether kernel, driver, torch and torchvision agree about the GPUs here, and each of them computes."""
    if settings.cluster.address != "local":
        return [not_asked("GPU", "those of the cluster compute; `detr doctor` on its machines looks at theirs")]
    shown, trouble, cuda = driver()
    try:
        import torch
        import torchvision

        torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)  # compiled against a torch
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        pair = f"torch {_has('torch')} and torchvision {_has('torchvision')}"
        return [wrong("GPU", f"{pair} do not go together: {one_line(error)}", "Install both anew, from one index.")]
    if (torch.version.cuda is None) == hasattr(torchvision.version, "cuda"):
        pair = f"torch {torch.__version__} and torchvision {torchvision.__version__}"
        return [wrong("GPU", f"of {pair} one is made for CUDA, and one is not", "Install both anew, from one index.")]

    use_gpu = settings.train.use_gpu
    ready = torch.cuda.device_count() if torch.cuda.is_available() else 0
    lost = warning if use_gpu is False else wrong
    if not ready and shown and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
        found = f"the driver shows {shown}, for CUDA {cuda}, and torch {torch.__version__} none"
        return [lost("GPU", found, f"{_why_none(torch.version.cuda, cuda)}, or set train.use_gpu=false.")]
    if not ready and trouble:
        say = wrong if use_gpu else warning
        return [say("GPU", f"there is one of NVIDIA's, and its driver does not answer ({trouble})",
                    "Install the driver; after an update of it, restart the machine.")]  # fmt: skip
    if not ready:
        if use_gpu:
            return [wrong("GPU", "there is none, and train.use_gpu asks for one", "Leave train.use_gpu out.")]
        return [ok("GPU", f"none; torch {torch.__version__} computes on the CPU")]
    for gpu in range(ready):
        try:
            ones = torch.ones(64, 64, device=f"cuda:{gpu}")
            error = None if float((ones @ ones).sum()) == 64**3 else "its numbers are wrong"
        except RuntimeError as raised:
            error = one_line(raised)
        if error:
            return [lost("GPU", f"{torch.cuda.get_device_name(gpu)} does not compute: {error}",
                         "See whether it is busy (nvidia-smi), and whether this torch is made for it.")]  # fmt: skip
    names = ", ".join(torch.cuda.get_device_name(gpu) for gpu in range(ready))
    if ready < shown and "CUDA_VISIBLE_DEVICES" not in os.environ:
        return [warning("GPU", f"the driver shows {shown}, and torch {ready} ({names})", "See what hides the others.")]
    return [ok("GPU", f"torch {torch.__version__} computes on {names}")]


def _why_none(built: str | None, cuda: str) -> str:
    """What to do where torch, made for one CUDA, sees no GPU of a driver that is for another."""
    if built is None:
        return "Install a torch for CUDA"
    if int(built.split(".")[0]) > int(cuda.split(".")[0]):
        return f"Update the driver, since this torch is for CUDA {built}"
    return "See what hides them (CUDA_VISIBLE_DEVICES, the container's options)"


def driver() -> tuple[int, str, str]:
    """(GPUs that NVIDIA's driver shows, why it does not though there are, the newest CUDA it is for)."""
    import pynvml

    try:
        pynvml.nvmlInit()
        cuda = pynvml.nvmlSystemGetCudaDriverVersion_v2()
        return pynvml.nvmlDeviceGetCount(), "", f"{cuda // 1000}.{cuda % 1000 // 10}"
    except pynvml.NVMLError as error:
        return 0, str(error) if _has_nvidia() else "", "0.0"


def _has_nvidia() -> bool:
    """Whether the kernel sees a device of NVIDIA's that shows or computes."""
    for device in Path("/sys/bus/pci/devices").glob("*"):
        try:
            vendor, kind = ((device / name).read_text().strip() for name in ("vendor", "class"))
        except OSError:
            continue
        if vendor == "0x10de" and kind.startswith("0x03"):
            return True
    return False


def gpus_to_use() -> int:
    """How many GPUs a Ray that starts here may hand out."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    there = driver()[0]
    return there if visible is None else min(there, len([gpu for gpu in visible.split(",") if gpu.strip()]))


def check_disks(settings: RunSettings, folders: dict[str, str]) -> list[Finding]:
    """Room in the folders that are written to, by name, and where a Ray that starts here keeps its objects."""
    findings = [_disk(name, nearest(folder)) for name, folder in folders.items()]
    if settings.cluster.address == "local":
        findings += [_disk("Ray's folder", nearest(ray_folder()), RAY_FULL), *_shared_memory()]
    return findings or [not_asked("disk", "nothing is written on this machine")]


def _disk(name: str, folder: Path, full: float = 1.0) -> Finding:
    disk, check = os.statvfs(folder), f"disk: {name}"
    free = disk.f_bavail * disk.f_frsize
    used = 1 - disk.f_bavail / disk.f_blocks if disk.f_blocks else 0.0
    found = f"{free / GIB:.1f} GiB free at {folder}"
    advice = "Free some, or set RAY_TMPDIR to another disk." if full < 1 else "Free some, or name another disk."
    if disk.f_files and disk.f_favail < FEW_FILES:  # some file systems do not count them
        say = wrong if disk.f_favail < TOO_FEW_FILES else warning
        return say(check, f"{found}, but room for {disk.f_favail} more files only (inodes)", advice)
    if used > full:
        return wrong(check, f"{found}: {used:.0%} of it is used, and Ray makes no object above {full:.0%}", advice)
    if free < LITTLE:
        return (wrong if free < TOO_LITTLE else warning)(check, found, advice)
    return ok(check, found)


def _shared_memory() -> list[Finding]:
    import psutil

    shared = Path("/dev/shm")
    if not shared.is_dir():
        return []
    free = shutil.disk_usage(shared).free
    wanted = min(SHARED * psutil.virtual_memory().available, MOST_SHARED)
    found = f"{free / GIB:.1f} GiB free in {shared}"
    if free < wanted:
        found += f"; Ray wants {wanted / GIB:.1f}, and takes the disk instead, which is slow"
        return [warning("disk: shared memory", found,
                        "Give the container more (--shm-size, or a memory volume at /dev/shm).")]  # fmt: skip
    return [ok("disk: shared memory", found)]


def ray_folder() -> Path:
    """Where Ray keeps what it does not keep in memory."""
    told = os.environ.get("RAY_TMPDIR") or (sys.platform.startswith("linux") and os.environ.get("TMPDIR"))
    return Path(told or "/tmp") / "ray"


def nearest(path: str | Path) -> Path:
    """A folder, or the nearest above it that is there."""
    path = Path(path).absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def check_versions() -> list[Finding]:
    """The packages here against the ranges that the project names, and against those it was tested with."""
    from packaging.version import Version

    try:
        needed = needs()
    except PackageNotFoundError:
        return [warning("versions", f"{DISTRIBUTION} is not installed in this Python, so nobody knows what it needs",
                        f"Install it: {INSTALL}.")]  # fmt: skip
    amiss = {f"{one.name} {_has(one.name)} (needs {one.specifier or 'any'})" for one in needed if not _fits(one)}
    if amiss:
        return [wrong("versions", ", ".join(sorted(amiss)), f"Install anew: {INSTALL}.")]
    pinned = _tested()
    other = {
        f"{one.name} {_has(one.name)} (tested: {pinned[one.name]})" for one in needed
        if one.name in pinned and Version(pinned[one.name]).public != Version(_has(one.name)).public
    }  # fmt: skip
    if other:
        return [warning("versions", ", ".join(sorted(other)), f"If something is odd, install the tested: {INSTALL}.")]
    return [ok("versions", f"{len(needed)} packages, all {'as tested' if pinned else 'in their ranges'}")]


def needs() -> list[Requirement]:
    """What this project needs, with what it needs of others' extras. Raises PackageNotFoundError."""
    from packaging.requirements import Requirement

    needed = [one for one in map(Requirement, requires(DISTRIBUTION) or ()) if _applies(one, "")]
    for one in list(needed):
        try:
            inner = [Requirement(text) for text in requires(one.name) or ()] if one.extras else []
        except PackageNotFoundError:
            continue  # which is said of the package itself
        needed += [r for r in inner if any(_applies(r, extra) for extra in one.extras) and not _applies(r, "")]
    return needed


def _applies(requirement: Requirement, extra: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def _tested() -> dict[str, str]:
    """The version of each package that the tests ran with; of a checkout, since a wheel has no such file."""
    file = Path(__file__).resolve().parents[1] / "constraints.txt"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else ()
    return dict(match.groups() for line in lines if (match := re.fullmatch(r"([\w.-]+)==(\S+)", line.strip())))


def _fits(requirement: Requirement) -> bool:
    try:
        return requirement.specifier.contains(version(requirement.name), prereleases=True)
    except PackageNotFoundError:
        return False


def _has(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "missing"


def check_ports() -> list[Finding]:
    """What of this user's Ray and MLflow other machines can reach."""
    import psutil

    beyond: dict[str, set[int]] = {}  # ports by who listens there
    heads: dict[str, str] = {}  # the addresses of Rays, which not every process of theirs names
    try:
        listening = [one for one in psutil.net_connections("tcp") if one.status == psutil.CONN_LISTEN and one.pid]
    except psutil.AccessDenied:  # macOS tells root alone
        return [not_asked("open ports", "this system does not let its users see them")]
    for one in listening:
        address = ipaddress.ip_address(one.laddr.ip)
        if (getattr(address, "ipv4_mapped", None) or address).is_loopback:  # ::ffff:127.0.0.1, too
            continue
        try:
            process = psutil.Process(one.pid)
            whose = _whose(process) if process.uids().real == os.getuid() else None
        except psutil.Error:  # it has ended
            continue
        if whose is None:
            continue
        name, at = whose
        heads |= {name: f" at {at}"} if at else {}
        beyond.setdefault(name, set()).add(one.laddr.port)
    if not beyond:
        return [ok("open ports", "no Ray or MLflow of yours listens beyond this machine")]
    listed = "; ".join(
        f"{name.replace(' ', heads.get(name, '') + ' ', 1)}, {_ports(beyond[name])}" for name in sorted(beyond)
    )
    return [warning("open ports", f"other machines may reach your {listed}", "Let a firewall admit only machines of "
                    "the cluster; a token keeps others out, and does not hide what is said.")]  # fmt: skip


def _whose(process: psutil.Process) -> tuple[str, str | None] | None:
    """A process of Ray's or MLflow's: (which Ray or MLflow, where its head is if it says so); None for another."""
    import psutil

    command = " ".join(process.cmdline())
    if MLFLOWS.search(command):
        return f"MLflow (process {process.pid})", None
    if not RAYS.search(command):
        return None
    if not SESSION.search(command):  # the title of a worker says nothing of it, the command of the raylet above does
        with suppress(psutil.Error):
            raylet = process.parent()
            command = " ".join(raylet.cmdline()) if raylet else command
    at, session = RAY_AT.search(command), SESSION.search(command)
    return f"Ray ({session[0] if session else f'process {process.pid}'})", at[1] if at else None


def _ports(numbers: set[int]) -> str:
    return f"{len(numbers)} ports" if len(numbers) > 1 else f"port {min(numbers)}"
