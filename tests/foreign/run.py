"""Runs the model tests of transformers and PEFT on this project's classes and on transformers' own, and compares.

    python tests/foreign/run.py                      everything
    python tests/foreign/run.py --only peft -k lora  a part of it
    python tests/foreign/run.py --json counts.json   writes the counts as well

The tests come from the source distributions of the pinned releases. They are downloaded from the package index
(pypi.org, or PIP_INDEX_URL), checked against the hashes below and unpacked outside of the repository:

- transformers: ModelTesterMixin of tests/test_modeling_common.py and ConfigTester, on the model testers in
  model_cases.py. What these files import and the distribution lacks is in stubs.py.
- peft: tests/test_seq_classifier.py and tests/test_feature_extraction_models.py, on tiny random checkpoints made here
  (plugin.py puts them in place of the models on the Hub, and our classes in place of transformers').

A difference is a test that passes with transformers' classes and fails, is skipped or is missing with ours. Intended
differences are listed in differences.tsv (pattern with *, reason). The exit code is 1 if another one occurs, or if a
listed one no longer does.

Needs the `dev` extra, and the network for the two archives (12 MB). Takes 5.5 minutes of CPU time; 7:40 minutes were
measured with two processes on two cores that were busy with other work.
"""

import argparse
import hashlib
import html
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.request
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from urllib.parse import urljoin

HERE = Path(__file__).resolve().parent
ARCHIVES = {  # name-version and sha256 of the .tar.gz
    "transformers": ("transformers-5.23.0", "19d647a4d5d903a7c644ca5cde2d86efc3dde7d8c687ae7988806ff2205efa71"),
    "peft": ("peft-0.21.2", "b803ccfb3f3f316004d850284306687833a2235ea278fb56abc856203456142e"),
}
TEST_FILES = {
    "transformers": [str(HERE / "model_cases.py")],
    "peft": ["{tests}/test_seq_classifier.py", "{tests}/test_feature_extraction_models.py"],
}
# Folders in place of the Hub's models. PEFT's tests search the name for "Bert", "Roberta" and (any case) "deberta".
CHECKPOINTS = ("tiny-Roberta", "tiny-DeBertaV2")
SIDES = {"theirs": "transformers' own", "ours": "our"}
Results = dict[str, list[str]]  # test: outcome, pytest's report


def download(suite: str, folder: Path) -> Path:
    """The source distribution in `folder`, downloaded from the package index unless it is there.

    Exits if its sha256 is wrong, or if another release is installed.
    """
    release, sha256 = ARCHIVES[suite]
    if release != (installed := f"{suite}-{version(suite)}"):
        sys.exit(f"{installed} is installed; these are the tests of {release} (constraints.txt).")
    archive = folder / f"{release}.tar.gz"
    if archive.exists():
        source, content = f"{archive} (delete it)", archive.read_bytes()
    else:
        index = os.environ.get("PIP_INDEX_URL", "https://pypi.org/simple").rstrip("/") + f"/{suite}/"
        with urllib.request.urlopen(index, timeout=60) as page:
            links = re.findall(r'href="([^"]+)"', page.read().decode())
        source = next((urljoin(index, html.unescape(link)) for link in links if f"/{archive.name}" in link), "")
        if not source:
            sys.exit(f"{index} lists no {archive.name}.")
        with urllib.request.urlopen(source, timeout=300) as file:
            content = file.read()
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        sys.exit(f"{source}: sha256 is {found}, expected {sha256}.")
    archive.write_bytes(content)
    return archive


def unpack_tests(suite: str, folder: Path) -> Path:
    """The distribution's folder `tests`, unpacked, as a package."""
    release, _ = ARCHIVES[suite]
    with tarfile.open(download(suite, folder)) as archive:
        members = [x for x in archive if x.isfile() and re.fullmatch(rf"{re.escape(release)}/tests/\w+\.py", x.name)]
        archive.extractall(folder, members, filter="data")
    tests = folder / release / "tests"
    (tests / "__init__.py").touch()
    return tests


def make_checkpoints(folder: Path) -> None:
    """Tiny random models with a classifier and a tokenizer, as PEFT's tests load them from the Hub."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<s>", "<pad>", "</s>", "<unk>", *"this is a test prompt .".split()]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 64, "max_position_embeddings": 64}
    v2 = {"relative_attention": True, "position_buckets": 8, "norm_rel_ebd": "layer_norm", "share_att_key": True}
    v2 |= {"pos_att_type": "p2c|c2p", "position_biased_input": False, "conv_kernel_size": 3, "conv_act": "gelu"}
    configs = (transformers.RobertaConfig(**sizes), transformers.DebertaV2Config(**sizes, **v2, type_vocab_size=0))
    for name, config in zip(CHECKPOINTS, configs, strict=True):
        torch.manual_seed(0)
        model = transformers.AutoModelForSequenceClassification.from_config(config)
        # the bare model has RoBERTa's pooler, which the tests of AutoModel need
        bare = transformers.AutoModel.from_config(config).state_dict()
        state = model.state_dict() | {f"{model.base_model_prefix}.{key}": x for key, x in bare.items()}
        model.save_pretrained(folder / name, state_dict=state)
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", cls_token="<s>", sep_token="</s>"
        ).save_pretrained(folder / name)


def run_suite(suite: str, side: str, folder: Path, processes: int, selection: str) -> Results:
    """Outcomes of one suite with one side's classes; the log stays in `folder` as SUITE-SIDE.log."""
    tests = folder / ARCHIVES[suite][0] / "tests"
    log, results, settings = (folder / f"{suite}-{side}.{kind}" for kind in ("log", "json", "ini"))
    results.unlink(missing_ok=True)
    settings.write_text("[pytest]\n")  # in place of the repository's settings
    command = [sys.executable, "-m", "pytest", *(file.format(tests=tests) for file in TEST_FILES[suite])]
    command += ["-q", "-c", str(settings), "--rootdir", str(folder), "--noconftest", "--disable-warnings"]
    command += ["-p", "no:cacheprovider", "-p", "foreign.plugin", "-n", str(processes)]
    command += ["-k", selection] if selection else []
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(tests.parent), str(HERE.parent)]),
        "FOREIGN_SIDE": side,
        "FOREIGN_RESULTS": str(results),
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
    with log.open("w") as output:
        code = subprocess.run(command, cwd=folder, env=environment, stdout=output, stderr=output).returncode
    outcomes = json.loads(results.read_text()) if results.exists() else {}
    if code not in (0, 1) or not outcomes:  # 1: some tests failed, or a file could not be imported
        sys.exit(f"pytest ended with exit code {code}:\n" + "\n".join(log.read_text().splitlines()[-30:]))
    return outcomes


def read_expected(path: Path) -> dict[str, str]:
    """Pattern and reason of each listed difference."""
    rows = [line.split("\t") for line in path.read_text().splitlines() if line and not line.startswith("#")]
    return {pattern: reason for pattern, reason in rows}


def matches(pattern: str, test: str) -> bool:
    """Whether the pattern, in which only * is special, is the test's full name."""
    return re.fullmatch(".*".join(map(re.escape, pattern.split("*"))), test) is not None


def find_differences(theirs: Results, ours: Results) -> Results:
    """Tests that pass with transformers' classes and not with ours, with our outcome and report."""
    found = {test: ours.get(test, ["missing", ""]) for test, (outcome, _) in theirs.items() if outcome == "passed"}
    return {test: result for test, result in found.items() if result[0] != "passed"}


def unexpected_and_stale(differences: Results, expected: dict[str, str]) -> tuple[list[str], list[str]]:
    """Differences that no pattern matches, and patterns that match no difference."""
    unexpected = [test for test in differences if not any(matches(pattern, test) for pattern in expected)]
    stale = [pattern for pattern in expected if not any(matches(pattern, test) for test in differences)]
    return unexpected, stale


def error_line(report: str) -> str:
    """The line of pytest's report that names the error, or the last one."""
    lines = [line.strip() for line in report.splitlines() if line.strip()] or [""]
    return next((line[1:].strip() for line in lines if line.startswith("E  ")), lines[-1])


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--only", choices=list(ARCHIVES), help="run this suite alone")
    parser.add_argument(
        "-k", dest="selection", default="", metavar="EXPR", help="pytest's -k; stale entries are then not reported"
    )
    parser.add_argument("-n", dest="processes", type=int, default=2, metavar="N", help="test processes (default 2)")
    parser.add_argument("--work", type=Path, metavar="DIR", help="keep archives, tests and logs here for the next run")
    parser.add_argument("--keep", action="store_true", help="keep the temporary folder, and print its name")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write counts and differences here")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    start = time.perf_counter()
    folder = (arguments.work or Path(tempfile.mkdtemp(prefix="foreign-"))).resolve()
    if HERE.parents[1] in (folder, *folder.parents):
        sys.exit(f"--work {folder} is in the repository, where no file of transformers or PEFT may be. Choose another.")
    folder.mkdir(parents=True, exist_ok=True)
    suites = [arguments.only] if arguments.only else list(ARCHIVES)
    for suite in suites:
        unpack_tests(suite, folder)
    make_checkpoints(folder)
    counts: dict[str, dict[str, dict[str, int]]] = {}
    differences: Results = {}
    for suite in suites:
        results = {}
        counts[suite] = {}
        for side, name in SIDES.items():
            results[side] = run_suite(suite, side, folder, arguments.processes, arguments.selection)
            count = Counter(outcome for outcome, _ in results[side].values())
            counts[suite][side] = {outcome: count[outcome] for outcome in ("passed", "failed", "skipped")}
            shown = ", ".join(f"{n} {outcome}" for outcome, n in counts[suite][side].items())
            print(f"{suite}, {name} classes: {shown}", flush=True)
        found = find_differences(results["theirs"], results["ours"])
        differences |= {f"{suite}/{test}": result for test, result in found.items()}

    expected = {
        pattern: reason
        for pattern, reason in read_expected(HERE / "differences.tsv").items()
        if pattern.split("/")[0] in suites
    }
    unexpected, stale = unexpected_and_stale(differences, expected)
    if arguments.selection:
        stale = []
    for pattern, reason in expected.items():
        tests = [test for test in differences if matches(pattern, test)]
        print(f"expected, {len(tests)} tests: {pattern}: {reason}")
    for test in unexpected:
        outcome, report = differences[test]
        print(f"UNEXPECTED, {outcome} with ours: {test}: {error_line(report)}")
    for pattern in stale:
        print(f"STALE: no difference matches {pattern}; delete it from {HERE / 'differences.tsv'}.")
    seconds = round(time.perf_counter() - start)
    print(f"{len(differences)} differences, {len(unexpected)} of them unexpected; {seconds} s")
    if arguments.keep or arguments.work:
        print(f"Archives, tests and logs are in {folder}")
    else:
        shutil.rmtree(folder)
    if arguments.json:
        outcomes = {test: outcome for test, (outcome, _) in differences.items()}
        summary = {"counts": counts, "differences": outcomes, "unexpected": unexpected, "stale": stale}
        arguments.json.write_text(json.dumps(summary | {"seconds": seconds}, indent=1) + "\n")
    return 1 if unexpected or stale else 0


if __name__ == "__main__":
    sys.exit(main())
