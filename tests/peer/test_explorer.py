"""Every interleaving of the push protocol, with ranks that crash, waits that end and calls that differ.

Mutants of the protocol are found out.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

PEER = Path(__file__).parents[2] / "csrc" / "peer"

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.mark.parametrize(
    "options",
    [
        "2 3 1",
        "2 3 2 late",
        "2 3 1 crash timeout late",
        "2 3 1 twice timeout",
        "2 3 2 shorter late",
        "2 3 1 dtype crash timeout late",
        "2 3 1 other crash timeout late",
        "3 3 1 crash",
        "3 2 2",
        "3 3 2 shorter",
        "3 3 1 dtype",
        "3 3 1 other crash",
        pytest.param("2 3 2 crash timeout late", marks=pytest.mark.slow),
        pytest.param("3 3 1 late", marks=pytest.mark.slow),
        "3 1 1 crash timeout",
    ],
)
def test_every_interleaving(compile_program: Callable[..., Path], run_program: Run, options: str) -> None:
    result = run_program(compile_program("explorer.cpp", "-O2"), *options.split())
    assert result.returncode == 0, result.stdout + result.stderr
    assert "states" in result.stdout


@dataclass(frozen=True)
class Mutant:
    name: str
    options: str
    old: str
    new: str
    header: str = "host.h"
    found: str = ""  # part of the explorer's output


EMPTY = "for (int i = 0; i < count; i += Access::kWords) Access::store_words(from + i, empty);"
READ = "if (!read(from, words, count) && !wait(source, from, words, count)) return false;"

MUTANTS = [
    Mutant("one slot", "2 3 1", "constexpr int kSlots = 2;", "constexpr int kSlots = 1;", "protocol.h", "wrong words"),
    Mutant("not emptied", "2 3 1", EMPTY, "(void)empty;", found="wrong words"),
    Mutant(
        "emptied before it is read",
        "2 3 1",
        READ,
        f"const uint32_t empty_[Access::kWords] = {{}};\n{EMPTY.replace('empty)', 'empty_)')}\n{READ}",
        found="wait forever",
    ),
    Mutant(
        "emptied by the sender",
        "2 3 1",
        "  void end() {\n",
        "  void end() {\n    const uint32_t empty[Access::kWords] = {};\n"
        "    for (int i = 1; i < peers_.ranks; ++i) Access::store_words(slot_ptr(i, peers_.rank), empty);\n",
    ),
    Mutant(
        "slots by another counter",
        "2 3 1",
        "region_offset(channel_, epoch_, source",
        "region_offset(channel_, 2 * epoch_, source",
        found="wrong words",
    ),
    Mutant("poison unseen by a new call", "2 3 1 timeout", "(const uint32_t poison = Access::load(&header(0)->poison))",
           "(const uint32_t poison = 0)", found="without a look"),
    Mutant("poison unseen in a wait", "3 3 1 crash", "uint32_t poison = Access::load(&header(0)->poison);",
           "uint32_t poison = 0;", found="wait forever"),
    Mutant("others are not told", "3 3 1 crash", "for (int i = 0; i < peers_.ranks; ++i)\n      if (Access::load",
           "for (int i = 0; i < 1; ++i)\n      if (Access::load", found="wait forever"),
    Mutant("blamed without another look", "2 3 1", "fault = wait.pause(*sender, peers_.timeout_ns);",
           "fault = wait.pause(*sender, peers_.timeout_ns);\n"
           "if (fault != Fault::kNone) return report_fault(poison_word(fault, source, peers_.rank), 0);",
           found="no reason"),
    Mutant("tags not compared", "2 3 2 shorter", "if (!std::equal(words", "if (false && !std::equal(words",
           found="not the others'"),
    Mutant("a tag not waited for", "3 3 1 dtype", "if (source == peers_.rank) continue;",
           "if (source == peers_.rank || source > 1) continue;", found="not the others'"),
    Mutant("tags not emptied", "2 3 1", "store_tag(from, {});", "", found="a word was left"),
    Mutant("tags in one slot", "2 3 1", "region_offset(kTags, epoch_, source, bytes)",
           "region_offset(kTags, 0, source, bytes)"),
    Mutant("calls told after the poison", "2 3 1 other", "bool report_mismatch(int source, const CallTag& theirs) {",
           "bool report_mismatch(int source, const CallTag& theirs) {\n"
           "    report_fault(poison_word(Fault::kMismatch, source, peers_.rank), 0);", found="names another call"),
    Mutant("calls not told to others", "3 3 1 other", "store_tag(header(i)->calls[source].words, theirs);",
           "if (i == 0) store_tag(header(i)->calls[source].words, theirs);", found="names another call"),
    Mutant("two calls at once", "2 3 1 twice timeout", "if (claim != epoch_)", "if (false)"),
]  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name.replace(" ", "_"))
def test_mutants_are_found(compile_program: Callable[..., Path], run_program: Run, mutant: Mutant) -> None:
    header = (PEER / mutant.header).read_text()
    assert header.count(mutant.old) == 1, f"{mutant.header} has changed; this mutant no longer fits it"
    program = compile_program("explorer.cpp", headers={mutant.header: header.replace(mutant.old, mutant.new)})
    result = run_program(program, *mutant.options.split())
    assert result.returncode == 1, result.stdout + result.stderr
    assert result.stdout.startswith("violation: ")
    assert mutant.found in result.stdout
