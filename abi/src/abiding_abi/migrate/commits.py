"""``migrate --commit``: one git commit per kind of change, so that each can be reviewed by itself.

The commits are made beside the working tree, which then goes forward to the last one. So either all of them are there
or nothing changed, and no file is ever seen half migrated. Commits in between are for reading: they do not compile.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from abiding_abi import rules
from abiding_abi.errors import UserError
from abiding_abi.migrate import INCLUDES, KINDS, NOTES, Result


@dataclass(frozen=True)
class Step:
    """One commit to make."""

    kind: str
    files: dict[Path, bytes]
    edits: Counter[str]

    @property
    def message(self) -> str:
        """The subject, and the rules with their number of places."""
        marks = self.kind == NOTES
        subject = "Mark what a person has to decide" if marks else f"Migrate {self.kind} to the stable ABI of torch"
        legacy = {rule.code: rule.legacy for rule in rules.table()}
        lines = [f"{count:5} {code} {legacy.get(code, '')}" for code, count in sorted(self.edits.items())]
        return "\n".join([subject, "", *lines, "", "Made by abiding-abi migrate --commit."])


def steps(result: Result) -> Iterator[Step]:
    """The kinds of change that a run made, in their order; new Python modules and headers go where they belong."""
    for kind in KINDS:
        stages = {file.path: stage for file in result.files for stage in file.stages if stage.kind == kind}
        files = {path: stage.data for path, stage in stages.items()}
        if kind in ("registration", INCLUDES):
            python = kind == "registration"
            new = {path: text.encode() for path, text in result.modules.items() if (path.suffix == ".py") == python}
            files |= {path: data for path, data in new.items() if not path.exists() or path.read_bytes() != data}
        if files:
            yield Step(kind, files, sum((stage.edits for stage in stages.values()), Counter()))


def commit(result: Result) -> list[str]:
    """Commit a run to the repository of its files; the new commits, oldest first, as ``hash subject``.

    Raises:
        UserError: outside a repository, in a tree with changes, for files that git does not know or that lie in
            several repositories, and where git refuses. Nothing is changed then.
    """
    planned = list(steps(result))
    if not planned:
        return []
    repository = _Repository([path for step in planned for path in step.files], set(result.modules))
    done: list[str] = []
    tip = start = repository.head
    with tempfile.TemporaryDirectory() as scratch:
        index = {"GIT_INDEX_FILE": os.path.join(scratch, "index")}
        repository.git("read-tree", start, environment=index)
        for step in planned:
            entries = []
            for path, data in step.files.items():
                name = repository.names[path]
                blob = repository.git("hash-object", "-w", f"--path={name}", "--stdin", data=data)
                entries.append(f"{repository.modes.get(name, '100644')} {blob}\t{name}\0")
            repository.git("update-index", "--add", "-z", "--index-info", data="".join(entries).encode(),
                           environment=index)  # fmt: skip
            tree = repository.git("write-tree", environment=index)
            tip = repository.git("commit-tree", *repository.signed, "-p", tip, tree, data=step.message.encode())
            done.append(f"{tip[:9]} {step.message.splitlines()[0]}")
    repository.git("merge", "--ff-only", "--quiet", tip)
    return done


class _Repository:
    """The repository that all files lie in, once it is fit for commits."""

    def __init__(self, paths: list[Path], new: set[Path]) -> None:
        folders = {_existing(path.absolute().parent) for path in paths}
        tops = {folder: _top(folder) for folder in folders}
        if len(set(tops.values())) > 1:
            raise UserError(f"the files lie in several repositories: {', '.join(sorted(set(tops.values())))}")
        self.top = next(iter(tops.values()))
        real = Path(self.top).resolve()
        self.names = {path: os.path.relpath(path.resolve(), real).replace(os.sep, "/") for path in paths}
        self.head = self._head()
        status = self.git("status", "--porcelain", "-z", "--no-renames", "--untracked-files=no")
        if changed := [entry[3:] for entry in status.split("\0") if entry]:
            more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
            raise UserError(f"{changed[0]}{more} changed since the last commit: commit or stash that first")
        listed = self.git("ls-files", "--stage", "-z", "--", *sorted(set(self.names.values())), literal=True)
        self.modes = {name: line[:6] for line, _, name in (row.partition("\t") for row in listed.split("\0") if row)}
        for path, name in self.names.items():
            if name not in self.modes and (path not in new or path.exists()):
                raise UserError(f"{name} is not under version control: add and commit it first")
        ignored = [name for name in set(self.names.values()) - set(self.modes) if self._ignores(name)]
        if ignored:
            raise UserError(f"git ignores {ignored[0]}, which would be new: change .gitignore, or use --write")
        signs = self.git("config", "--type=bool", "--default=false", "commit.gpgsign")
        self.signed = ("-S",) if signs == "true" else ()

    def _head(self) -> str:
        try:
            return self.git("rev-parse", "--verify", "--quiet", "HEAD^{commit}")
        except UserError:
            raise UserError(f"{self.top} has no commit yet: make one first, so that there is something to go back to") \
                from None  # fmt: skip

    def _ignores(self, name: str) -> bool:
        return _run(["check-ignore", "--quiet", "--", name], self.top).returncode == 0

    def git(
        self,
        *arguments: str,
        data: bytes | None = None,
        environment: dict[str, str] | None = None,
        literal: bool = False,
    ) -> str:
        """What git prints, without the last line's end; its complaint, if it has one, is the user's."""
        done = _run([*(["--literal-pathspecs"] if literal else []), *arguments], self.top, data, environment)
        if done.returncode:
            complaint = os.fsdecode(done.stderr).strip().splitlines()
            raise UserError(f"git {arguments[0]}: {complaint[-1] if complaint else 'failed'}; nothing was changed")
        return os.fsdecode(done.stdout).removesuffix("\n")


def _existing(folder: Path) -> Path:
    while not folder.is_dir():
        folder = folder.parent
    return folder


def _top(folder: Path) -> str:
    done = _run(["rev-parse", "--show-toplevel"], str(folder))
    if done.returncode:
        raise UserError(f"{folder} is not in a git repository: use --write there")
    return os.fsdecode(done.stdout).removesuffix("\n")


def _run(
    arguments: list[str], folder: str, data: bytes | None = None, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[bytes]:
    try:
        return subprocess.run(["git", *arguments], cwd=folder, input=data, env={**os.environ, **(environment or {})},
                              capture_output=True, check=False)  # fmt: skip
    except FileNotFoundError:
        raise UserError("--commit needs git, which is not found here") from None
