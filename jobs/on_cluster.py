"""What a job of `detr submit` runs: look whether this Python has what the command needs, then run the command.

    python -m jobs.on_cluster COMMAND [OPTION|KEY=VALUE]...

It runs in the cluster's Python, whatever that is: of the standard library alone until the look is over.
"""
import json
import os
import re
import sys

LEAST_PYTHON = (3, 11)
REQUIREMENTS = "requirements.txt"  # beside the packages, a line for each: ray[data]>=2.60,<2.62


def main():
    folder = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    with open(os.path.join(folder, REQUIREMENTS), encoding="utf-8") as file:
        amiss = lacking(file.read().split())
    if amiss:
        wanted = [f"'{line}'" for line, _ in amiss if line]
        install = f", or install it there: pip install {' '.join(wanted)}" if wanted else ""
        error = (
            f"The cluster's Python, {sys.executable}, lacks what the command needs ({'; '.join(w for _, w in amiss)}): "
            f"give its machines the image of deploy/Dockerfile{install}"
        )
        print(json.dumps({"exit_code": 1, "error": error}))
        sys.exit(error)  # said on stderr; the exit code is 1

    from jobs.cli import main as detr

    detr([sys.argv[1], "--json", *sys.argv[2:]], prog_name="detr")


def lacking(requirements):
    """What of requirements such as 'ray[data]>=2.60,<2.62' is not so here: [(the requirement or "", why)]."""
    if sys.version_info < LEAST_PYTHON:
        return [("", f"it is Python {sys.version.split()[0]} and must be {LEAST_PYTHON[0]}.{LEAST_PYTHON[1]} or later")]
    from importlib.metadata import PackageNotFoundError, version

    amiss = []
    for line in requirements:
        name, _, versions = re.match(r"([\w.-]+)(\[[^]]*\])?(.*)", line).groups()
        try:
            found = version(name)
        except PackageNotFoundError:
            amiss.append((line, f"{name} is missing"))
        else:
            if not fits(found, versions):
                amiss.append((line, f"{name} is {found} and must be {versions}"))
    return amiss


def fits(found, versions):
    """Whether a version such as '2.15.0+cu132' is in '>=2.10,<3'. Raises ValueError for conditions but >= and <."""
    for condition in filter(None, versions.split(",")):
        sign, bound = re.match(r"([<>=!~]*)(.*)", condition).groups()
        have, want = _numbers(found), _numbers(bound)
        have, want = (numbers + [0] * (max(len(have), len(want)) - len(numbers)) for numbers in (have, want))
        if sign not in (">=", "<"):
            raise ValueError(f"{condition}: only >= and < are understood")
        if (have < want) == (sign == ">="):
            return False
    return True


def _numbers(version):
    """'2.15.0+cu132' -> [2, 15, 0]; what follows the numbers (rc1, .dev3) does not count."""
    return [int(number) for number in re.match(r"\d+(\.\d+)*", version).group().split(".")]


if __name__ == "__main__":
    main()
