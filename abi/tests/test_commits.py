"""``migrate --commit``: a series of commits, or nothing changed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from abiding_abi import migrate
from abiding_abi.errors import UserError
from abiding_abi.lint import Config
from abiding_abi.migrate import commits
from abiding_abi.migrate.commits import commit

SOURCE = """#include <torch/extension.h>
at::Tensor f(at::Tensor x, int n) {
  TORCH_CHECK(n > 0, "n");
  auto y = at::cat({x, x}, 0);
  at::nothing(x);
  return y;
}
PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) { m.def("f", &f); }
"""
KINDS = [
    "Migrate registration to the stable ABI of torch",
    "Migrate checks to the stable ABI of torch",
    "Migrate types to the stable ABI of torch",
    "Migrate functions to the stable ABI of torch",
    "Migrate includes to the stable ABI of torch",
    "Mark what a person has to decide",
]


def git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository of one extension, in a folder whose name has a space."""
    for name in ("GIT_DIR", "GIT_INDEX_FILE", "GIT_WORK_TREE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "config"))
    (tmp_path / "config").write_text("[user]\nname = A\nemail = a@b.c\n[init]\ndefaultBranch = main\n")
    folder = tmp_path / "a tree"
    (folder / "csrc" / "ä").mkdir(parents=True)
    git(folder, "init", "--quiet")
    (folder / "setup.py").write_text("CppExtension('pack._C', ['csrc/ä/f.cpp'])\n")
    (folder / "csrc" / "ä" / "f.cpp").write_text(SOURCE)
    (folder / "csrc" / "ä" / "f.cpp").chmod(0o755)
    (folder / "pack").mkdir()
    (folder / "pack" / "__init__.py").write_text("")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "-m", "Start")
    monkeypatch.chdir(folder)
    return folder


def migrated(folder: Path) -> migrate.Result:
    return migrate.run([folder / "csrc"], Config(root=folder))


def state(folder: Path) -> tuple[str, str, dict[str, bytes]]:
    """What must not change: the commit, what git says, and every file."""
    files = {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file() and ".git" not in p.parts}
    return git(folder, "rev-parse", "HEAD"), git(folder, "status", "--porcelain"), files


def refused(folder: Path, text: str) -> None:
    """A commit that is refused with this text, and leaves everything as it was."""
    result = migrated(folder)
    before = state(folder)
    with pytest.raises(UserError, match=text):
        commit(result)
    assert state(folder) == before


def test_one_commit_per_kind(repository: Path) -> None:
    result = migrated(repository)
    lines = commit(result)
    assert [line.split(" ", 1)[1] for line in lines] == KINDS
    assert git(repository, "log", "--reverse", "--format=%s").splitlines() == ["Start", *KINDS]
    assert git(repository, "status", "--porcelain") == ""
    file = result.files[0]
    assert file.path.read_bytes() == file.after
    assert os.access(file.path, os.X_OK)
    module, header = sorted(result.modules, key=lambda path: path.suffix, reverse=True)
    changed = [git(repository, "log", "--format=%s", "--", str(path)).strip() for path in (module, header)]
    assert changed == [KINDS[0], KINDS[4]]
    bodies = git(repository, "log", "--format=%b")
    assert "1 CHK001 TORCH_CHECK" in bodies
    assert "1 ABI001" in bodies
    assert commit(migrated(repository)) == []


def test_each_commit_holds_its_kind_alone(repository: Path) -> None:
    commit(migrated(repository))
    diff = git(repository, "show", "--format=", f":/{KINDS[1]}")
    changed = [line for line in diff.splitlines() if line[:1] in "+-" and line[:3] not in ("+++", "---")]
    assert changed == ['-  TORCH_CHECK(n > 0, "n");', '+  STD_TORCH_CHECK(n > 0, "n");']


def test_line_ends_that_git_converts(repository: Path) -> None:
    (repository / ".gitattributes").write_text("*.cpp text eol=crlf\n")
    path = repository / "csrc" / "ä" / "f.cpp"
    path.write_bytes(SOURCE.replace("\n", "\r\n").encode())
    git(repository, "add", ".")
    git(repository, "commit", "--quiet", "-m", "Ends")
    result = migrated(repository)
    commit(result)
    assert path.read_bytes() == result.files[0].after
    assert "\r" not in git(repository, "show", "HEAD:csrc/ä/f.cpp")
    assert git(repository, "status", "--porcelain") == ""


def test_untracked_files_beside_do_not_matter(repository: Path) -> None:
    (repository / "notes.txt").write_text("mine\n")
    commit(migrated(repository))
    assert git(repository, "status", "--porcelain") == "?? notes.txt\n"


def _edit(folder: Path) -> None:
    (folder / "setup.py").write_text("changed\n")


def _stage(folder: Path) -> None:
    _edit(folder)
    git(folder, "add", "setup.py")


def _untracked(folder: Path) -> None:
    (folder / "csrc" / "g.cpp").write_text("at::Tensor a;\n")


def _ignored(folder: Path) -> None:
    (folder / ".git" / "info" / "exclude").write_text("pack/_C.py\n")


def _occupied(folder: Path) -> None:
    (folder / "pack" / "_C.py").write_text("# an earlier one, made by abiding-abi migrate\n")


def _second(folder: Path) -> None:
    inner = folder / "csrc" / "inner"
    inner.mkdir()
    git(inner, "init", "--quiet")
    (inner / "g.cpp").write_text("at::Tensor a;\n")


def _nameless(folder: Path) -> None:
    (folder.parent / "config").write_text("[user]\nuseConfigOnly = true\n")


def _gone(folder: Path) -> None:
    (folder / ".git").rename(folder.parent / "git")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (_edit, "^setup.py changed since the last commit: commit or stash that first$"),
        (_stage, "^setup.py changed since the last commit"),
        (_untracked, "^csrc/g.cpp is not under version control: add and commit it first$"),
        (_ignored, "^git ignores pack/_C.py, which would be new"),
        (_occupied, "^pack/_C.py is not under version control"),
        (_second, "^the files lie in several repositories: "),
        (_nameless, "^git commit-tree: .*; nothing was changed$"),
    ],
)
def test_refused_and_untouched(change: Callable[[Path], None], text: str, repository: Path) -> None:
    change(repository)
    refused(repository, text)


def test_file_that_changes_meanwhile_is_kept(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = migrated(repository)
    path = result.files[0].path
    plan = list(commits.steps(result))
    monkeypatch.setattr(commits, "steps", lambda _: plan)
    real = commits._run

    def late(arguments: list[str], *rest: object) -> subprocess.CompletedProcess[bytes]:
        if arguments[0] == "merge":
            path.write_text("mine\n")
        return real(arguments, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(commits, "_run", late)
    head = git(repository, "rev-parse", "HEAD")
    with pytest.raises(UserError, match=r"^git merge: "):
        commits.commit(result)
    assert (path.read_text(), git(repository, "rev-parse", "HEAD")) == ("mine\n", head)


def test_outside_a_repository(repository: Path) -> None:
    _gone(repository)
    with pytest.raises(UserError, match=r"is not in a git repository: use --write there$"):
        commit(migrated(repository))


def test_without_a_commit_to_go_back_to(repository: Path) -> None:
    _gone(repository)
    git(repository, "init", "--quiet")
    git(repository, "add", ".")
    with pytest.raises(UserError, match="has no commit yet"):
        commit(migrated(repository))


def test_command_line(repository: Path) -> None:
    command = [sys.executable, "-m", "abiding_abi", "migrate", "csrc", "--commit"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert [line.split(" ", 1)[1] for line in done.stdout.splitlines()[:6]] == KINDS
    assert "1 places for a person" in done.stdout
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert again.stdout.splitlines()[0] == "nothing to commit"
    (repository / "setup.py").write_text("changed\n")
    (repository / "csrc" / "ä" / "f.cpp").write_text(SOURCE)
    dirty = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (dirty.returncode, dirty.stdout) == (2, "")
    assert dirty.stderr.startswith("abiding-abi: csrc/ä/f.cpp and 1 more changed")


def test_commits_are_signed_where_the_settings_say_so(repository: Path) -> None:
    signer = repository.parent / "gpg"
    signer.write_text("#!/bin/sh\ncat > /dev/null\necho '[GNUPG:] SIG_CREATED ' >&2\necho made-up-signature\n")
    signer.chmod(0o755)
    git(repository, "config", "gpg.program", str(signer))
    git(repository, "config", "commit.gpgsign", "true")
    commit(migrated(repository))
    assert git(repository, "cat-file", "commit", "HEAD~1").count("made-up-signature") == 1
