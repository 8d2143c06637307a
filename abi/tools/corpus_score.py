"""Score lint and migrate on the corpus; totals go to `results/`, places in the packages' code only to `.corpus/`.

python tools/corpus_score.py recall  --half development|held-out   # sites of corpus_truth.py that lint finds
python tools/corpus_score.py sample  --count 400                   # draw findings of the development half to judge
python tools/corpus_score.py judged                                # count the judgements in results/lint-sample.tsv
python tools/corpus_score.py migrate --half development|held-out   # share of findings that migrate rewrites
python tools/corpus_score.py control                               # findings in sources that were migrated before
python tools/corpus_score.py speed                                 # seconds per 100,000 lines on one core
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from corpus import CONTROL, DEVELOPMENT, HEADERS, HELD_OUT, ROOT, SOURCES, STORE, Package, own_files, read_lock
from corpus_truth import sites

from abiding_abi.lint import Config, Finding, run

RESULTS = ROOT / "results"
JUDGED = RESULTS / "lint-sample.tsv"


def packages(half: str, names: Iterable[str] = ()) -> list[Package]:
    chosen = [p for p in read_lock() if p.half == half and (not names or p.name in names)]
    absent = [p.name for p in chosen if not p.folder.is_dir()]
    if absent:
        raise SystemExit(f"not unpacked: {', '.join(absent)}; run corpus.py fetch --half {half}")
    return chosen


def findings(package: Package) -> list[Finding]:
    """What lint says of a package's own sources and headers."""
    files = own_files(package.folder, SOURCES + HEADERS)
    return list(run(files, Config(root=package.folder)).findings) if files else []


def write(name: str, data: dict[str, object]) -> None:
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    command = " ".join(["python", "tools/corpus_score.py", *sys.argv[1:]])
    path.write_text(json.dumps({"command": command, **data}, indent=1) + "\n")
    print(f"wrote {path.relative_to(ROOT)}")


def on_lines(covered: dict[str, dict[int, list[Finding]]], path: str, first: int, last: int) -> list[Finding]:
    return [f for line in range(first, last + 1) for f in covered.get(path, {}).get(line, [])]


def recall(half: str, names: list[str], missed_to: Path | None) -> None:
    """A site is a file, a line and the name that the compiler lacks; a finding on that line with the name finds it."""
    rows: dict[str, object] = {}
    total = found = 0
    missed: list[str] = []
    unknown: list[str] = []
    for package in packages(half, names):
        try:
            truth = sites(package)
        except FileNotFoundError:
            print(f"{package.name}: not compiled; run corpus_truth.py --half {half}")
            unknown.append(package.name)
            continue
        covered: dict[str, dict[int, list[Finding]]] = {}
        for finding in findings(package):
            lines = covered.setdefault(finding.path, {})
            for line in range(finding.line, finding.end_line + 1):
                lines.setdefault(line, []).append(finding)
        hits = 0
        for site in truth:
            near = on_lines(covered, site.path, site.line, site.last_line)
            inside = [f for place in site.macros for f in on_lines(covered, *place)]
            if any(site.name in f.found for f in near) or inside:
                hits += 1
            else:
                missed.append(f"{package.name}/{site.path}:{site.line}\t{site.name}\t{site.message}")
        here = len(truth)
        rows[package.name] = {"version": package.version, "sites": here, "found": hits}
        total, found = total + here, found + hits
        print(f"{package.name:28} {hits:6} of {here:6}", flush=True)
    print(f"{half}: {found} of {total} sites found, {found / max(total, 1):.4%}")
    if missed_to:
        missed_to.write_text("\n".join(missed) + "\n")
    if not names:
        share = round(found / max(total, 1), 5)
        totals = {"half": half, "sites": total, "found": found, "recall": share, "not_compiled": unknown}
        write(f"lint-recall-{half}", {**totals, "packages": rows})


def sample(count: int, names: list[str], salt: str) -> None:
    """Findings in the order of a hash of their place, the first ones: the same for the same findings and salt."""
    drawn: list[tuple[str, Package, Finding]] = []
    for package in packages(DEVELOPMENT, names):
        for finding in findings(package):
            place = f"{package.name}\t{finding.path}\t{finding.line}\t{finding.column}\t{finding.rule.code}"
            drawn.append((hashlib.sha256((salt + place).encode()).hexdigest(), package, finding))
    drawn.sort(key=lambda item: item[0])
    known = {tuple(line.split("\t")[:5]): line.split("\t")[5] for line in _judged_lines()}
    rows = []
    for _, package, finding in drawn[:count]:
        text = (package.folder / finding.path).read_text(encoding="utf-8", errors="replace").splitlines()
        line = text[finding.line - 1].strip()[:160] if finding.line <= len(text) else ""
        place = f"{package.name}\t{finding.path}\t{finding.line}\t{finding.column}\t{finding.rule.code}"
        verdict = known.get(tuple(place.split("\t")), "")
        rows.append(f"{place}\t{verdict}\t{finding.found[:60]}\t{line}")
    target = STORE / "sample.tsv"
    target.write_text("\n".join(rows) + "\n")
    print(
        f"{len(rows)} of {len(drawn)} findings in {target.relative_to(ROOT)}: judge each in column 6 as true or false,"
    )
    print("then keep columns 1 to 6 as results/lint-sample.tsv; judgements that stand there are carried over")


def _judged_lines() -> list[str]:
    return [line for line in JUDGED.read_text().splitlines() if line] if JUDGED.exists() else []


def judged() -> None:
    rows = [line.split("\t") for line in _judged_lines()]
    verdicts = [row[5] for row in rows]
    wrong = sum(v == "false" for v in verdicts)
    if not all(v in ("true", "false") for v in verdicts):
        raise SystemExit("a finding without judgement")
    print(f"{wrong} of {len(rows)} false, {wrong / len(rows):.2%}")
    write("lint-sample", {"judged": len(rows), "false": wrong, "share": round(wrong / len(rows), 5)})


def control() -> None:
    rows: dict[str, object] = {}
    for package in packages(CONTROL):
        found = [f for f in findings(package) if f.level != "note"]
        rows[f"{package.name} {package.version}"] = len(found)
        for finding in found[:20]:
            print(f"{finding.path}:{finding.line}: {finding.rule.code} {finding.found}")
    own = [ROOT.parent / "csrc"]
    found = [f for f in run(own, Config(root=ROOT.parent)).findings if f.level != "note"]
    rows["csrc of this repository"] = len(found)
    for finding in found[:20]:
        print(f"{finding.path}:{finding.line}: {finding.rule.code} {finding.found}")
    print(rows)
    write("lint-control", {"findings": rows})


def speed() -> None:
    chosen = packages(DEVELOPMENT)
    lines = seconds = 0.0
    for package in chosen:
        files = own_files(package.folder, SOURCES + HEADERS)
        lines += sum(p.read_bytes().count(b"\n") for p in files)
        start = time.process_time()
        run(files, Config(root=package.folder))
        seconds += time.process_time() - start
    per = seconds / lines * 100_000
    print(f"{lines:.0f} lines in {seconds:.1f} s of one core: {per:.2f} s per 100,000 lines")
    write(
        "lint-speed", {"lines": int(lines), "cpu_seconds": round(seconds, 2), "seconds_per_100k_lines": round(per, 2)}
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["recall", "sample", "judged", "control", "speed"])
    parser.add_argument("--half", choices=[DEVELOPMENT, HELD_OUT], default=DEVELOPMENT)
    parser.add_argument("--package", action="append", default=[])
    parser.add_argument("--count", type=int, default=400)
    parser.add_argument("--salt", default="", help="another sample: after rules were corrected by the last one")
    parser.add_argument("--missed", type=Path, help="write the sites that were not found (development half only)")
    arguments = parser.parse_args()
    if arguments.missed and arguments.half == HELD_OUT:
        raise SystemExit("the held-out half stays unread: --missed is for the development half")
    if arguments.what == "recall":
        recall(arguments.half, arguments.package, arguments.missed)
    elif arguments.what == "sample":
        sample(arguments.count, arguments.package, arguments.salt)
    else:
        {"judged": judged, "control": control, "speed": speed}[arguments.what]()


if __name__ == "__main__":
    main()
