"""report.json and report.html of a finished run, of unfinished ones, and of broken ones."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fake_run import FULL, write_fake_run
from megatron_jet.configs.errors import UserError
from megatron_jet.configs.estimate_text import format_count
from megatron_jet.configs.files import read_json, write_json
from megatron_jet.configs.overrides import dump_yaml
from megatron_jet.configs.recipes.tiny import tiny
from megatron_jet.configs.stages import STAGE_ORDER
from megatron_jet.evaluation.report.build import build_report, main
from megatron_jet.evaluation.report.collect import collect
from megatron_jet.evaluation.report.html import candidate_curves, duration, render, signed, size_text, tiles

ROOT = Path(__file__).parents[2]
VOID = {"meta", "br", "link", "img", "hr", "input", "path", "use", "rect"}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    path = write_fake_run(tmp_path_factory.mktemp("runs") / "tiny")
    build_report(path)
    return path


@pytest.fixture(scope="module")
def page(run) -> str:
    return (run / "report.html").read_text(encoding="utf-8")


def without_measured(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: without_measured(v) for k, v in value.items() if k != "measured" and not k.endswith("_measured")}
    return [without_measured(item) for item in value] if isinstance(value, list) else value


def rescale_measured(value: Any, inside: bool = False) -> Any:
    """Every clock figure three times as large."""
    if isinstance(value, dict):
        return {k: rescale_measured(v, inside or k == "measured" or k.endswith("_measured")) for k, v in value.items()}
    if isinstance(value, list):
        return [rescale_measured(item, inside) for item in value]
    return value * 3 if inside and isinstance(value, float) else value


def test_only_measured_depends_on_the_clock_the_machine_and_the_directory(run, tmp_path):
    other = write_fake_run(tmp_path / "another name")
    for path in other.glob("stages/*/result.json"):
        write_json(path, rescale_measured(read_json(path)))
    for path in other.glob("stages/*/jobs/*/metrics.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        changed = [{**row, "tokens_per_second": 1.0, "memory_mib": 9.0} for row in rows]
        path.write_text("".join(json.dumps(row) + "\n" for row in changed))
    provenance = read_json(other / "provenance.json")
    provenance["launches"].append({**provenance["launches"][0], "time": "2027-01-01T00:00:00+0000"})
    write_json(other / "provenance.json", provenance)
    slow, fast = collect(other), read_json(run / "report.json")
    assert without_measured(slow) == without_measured(fast)
    assert slow["measured"]["seconds"] == pytest.approx(3 * fast["measured"]["seconds"])
    assert slow["measured"] != fast["measured"]


def test_figures_are_those_of_the_results(run):
    report = read_json(run / "report.json")
    evaluate = read_json(run / "stages" / "evaluate" / "result.json")
    for side in ("teacher", "final"):
        for task, pair in report["comparison"]["accuracy"].items():
            assert pair[side] == evaluate[side]["accuracy"][task]
        assert report["comparison"]["params"][side] == evaluate[f"{side}_params"]
    assert set(report["comparison"]["cache_bytes"]) == {"4096", "65536", "262144"}
    speeds = report["comparison"]["measured"]["generation_tokens_per_second"]
    assert list(speeds) == ["1024", "4096", "16384"]
    for pair in speeds.values():
        assert pair["ratio"] == pytest.approx(pair["final"] / pair["teacher"])
    assert report["complete"] and report["final"]["stage"] == "stage2"
    assert [row["stage"] for row in report["stages"]] == list(STAGE_ORDER[:-1])
    assert report["block_selection"]["candidates"][0]["name"] == report["block_selection"]["winner"]
    assert report["schema_version"] == 1
    json.dumps(report, allow_nan=False)


def test_every_documented_key_exists_and_every_key_is_documented(run):
    text = (ROOT / "docs" / "report.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"^\| `([a-z0-9_]+)`", text, flags=re.MULTILINE))
    assert documented == set(read_json(run / "report.json"))


def test_page_shows_the_figures(page):
    for text in (
        "95.5%",
        "97.0%",
        "1.54M",
        "32.1 MiB",
        "128 MiB",
        "2.70×",
        "−1.5 points",
        "{2, 5}",
        "16x64x4 (chosen)",
    ):
        assert text in page, text
    for heading in ("Findings", "Teacher and final model", "Where full attention stays", "Provenance"):
        assert f"<h2>{heading}</h2>" in page
    assert page.count("<svg") == 11
    assert "this part appears when" not in page
    assert "0123456789ab" in page and "launcher/postnas.py run tiny" in page


def test_the_first_card_has_the_text_loss_and_what_it_averages(run):
    """A mean of tasks near 100% hides what the model lost elsewhere."""
    report = read_json(run / "report.json")
    first = tiles(report)[0]
    assert first == {
        "value": "92.8%",
        "label": "mean of recall, choice, copy, held out",
        "note": "teacher 94.7%; text loss 1.560, teacher 1.490 nats",
    }
    del report["comparison"]["loss"]["text"]
    assert tiles(report)[0]["note"] == "teacher 94.7%"


def test_formulas_rank_and_timings_are_shown_beside_them(run, page):
    search = read_json(run / "report.json")["hardware_search"]
    assert search["throughput_mode"] == "analytic"
    for candidate in search["candidates"]:
        speed = candidate["measured"]["generation_tokens_per_second"]["2048"]
        cells = f"<td>{format_count(candidate['analytic_tokens_per_second']['2048'])}</td><td>{speed:,.0f}</td>"
        assert cells in page, candidate["name"]
    assert "as timed on this device, which decides nothing" in page


def test_a_candidate_that_did_not_fit_into_memory_has_no_speed_in_the_report(tmp_path):
    """Where measured speed ranks; its accuracy is shown all the same."""
    path = write_fake_run(tmp_path / "run")
    search = tiny().hardware_search
    measured = search.throughput.replace(mode="measured", also_timed=False)
    (path / "config.yaml").write_text(dump_yaml(tiny().replace(hardware_search=search.replace(throughput=measured))))
    result = read_json(path / "stages" / "hardware_search" / "result.json")
    result["candidates"][0]["measured"]["generation_tokens_per_second"] = {}
    write_json(path / "stages" / "hardware_search" / "result.json", result)
    report = collect(path)
    assert not any(row["name"] == "speed at equal cache" for row in report["measured"]["findings"])
    name = result["candidates"][0]["name"]
    row = re.search(rf"<td>{name}.*?</tr>", render(report), flags=re.DOTALL)
    assert row.group().endswith("<td>–</td></tr>")


def test_page_is_one_file(page):
    assert not re.search(r'(src|href)="(?!#)', page)
    assert "@import" not in page and "<script" not in page
    assert not re.search(r"url\((?!#)", page)


def test_page_is_well_formed_and_ids_are_unique(page):
    class Checker(HTMLParser):
        def __init__(self):
            super().__init__()
            self.open, self.ids = [], []

        def handle_starttag(self, tag, attributes):
            self.ids += [value for key, value in attributes if key == "id"]
            if tag not in VOID:
                self.open.append(tag)

        def handle_endtag(self, tag):
            if tag not in VOID:
                assert self.open and self.open[-1] == tag, (tag, self.open[-3:], self.getpos())
                self.open.pop()

    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    assert len(checker.ids) == len(set(checker.ids))
    for target in re.findall(r'(?:href="#|url\(#)([^")]+)', page):
        assert target in checker.ids, target


def test_foreign_text_is_escaped(tmp_path):
    path = write_fake_run(tmp_path / "run", ("prepare",))
    (path / "config.yaml").write_text(dump_yaml(tiny().replace(recipe="<script>alert(1)</script>")))
    page = render(collect(path))
    assert "<script" not in page and "&lt;script&gt;alert(1)" in page
    assert "+&lt;b&gt;" in page  # the uncommitted change in the fake run's provenance


@pytest.mark.parametrize("finished", [0, 2, 5, 8])
def test_unfinished_runs_have_a_report(tmp_path, finished):
    path = write_fake_run(tmp_path / "run", STAGE_ORDER[:finished])
    write_json(path / "stages" / "stage1" / "status.json", {"state": "running", "measured": {"seconds": 4.0}})
    build_report(path)
    report, page = read_json(path / "report.json"), (path / "report.html").read_text()
    assert not report["complete"] and "not finished" in page
    states = {row["stage"]: row["state"] for row in report["stages"]}
    assert all(states[stage] == "done" for stage in STAGE_ORDER[:finished])
    if finished <= STAGE_ORDER.index("stage1"):
        assert states["stage1"] == "running"
        assert "Stage 1: running; this part appears when the stage has finished" in page
    assert (report["placement"] is not None) == (finished > 1)


def test_run_of_some_stages_only(tmp_path):
    path = write_fake_run(tmp_path / "run", ("prepare", "placement"))
    (path / "config.yaml").write_text(dump_yaml(tiny().replace(stages=("prepare", "placement"))))
    report = collect(path)
    assert report["complete"] and [row["stage"] for row in report["stages"]] == ["prepare", "placement"]
    assert "Hardware search is not part of this run" in render(report)


def test_analytic_throughput_and_no_comparison_training(tmp_path):
    path = write_fake_run(tmp_path / "run")
    analytic = tiny().hardware_search.throughput.replace(mode="analytic")
    config = tiny().replace(hardware_search=tiny().hardware_search.replace(throughput=analytic))
    (path / "config.yaml").write_text(dump_yaml(config))
    for stage in ("evaluate", "hardware_search"):
        result = read_json(path / "stages" / stage / "result.json")
        for node in (result.get("teacher_measured"), result.get("final_measured"), *result.get("candidates", [])):
            if node is not None:
                figures = node.get("measured", node)
                figures["generation_tokens_per_second"] = figures["prefill_tokens_per_second"] = None
        write_json(path / "stages" / stage / "result.json", result)
    placement = read_json(path / "stages" / "placement" / "result.json")
    for row in placement["comparison"]:
        row["after"] = None
    placement |= {"swa": [], "swa_beam": [], "beam": [], "heat_map": []}
    write_json(path / "stages" / "placement" / "result.json", placement)
    report = collect(path)
    page = render(report)
    assert report["comparison"]["measured"]["generation_tokens_per_second"] == {}
    assert "(analytic)" in page and "by formula on one H100" in page
    assert "straight from the supernet after 120 steps" in page
    assert "as timed on this device" not in page.partition('<section id="sizes">')[2]
    assert not any(row["name"] == "generation speed" for row in report["measured"]["findings"])


def test_many_layers_and_candidates_without_tasks_in_common(tmp_path):
    """36 layers: no numbers in the cells; and eval sets of another name."""
    path = write_fake_run(tmp_path / "run", ("prepare", "placement"))
    result = read_json(path / "stages" / "placement" / "result.json")
    first = result["heat_map"][0]["scores"]
    result["heat_map"] = [{"full": [i], "scores": first} for i in range(36)]
    write_json(path / "stages" / "placement" / "result.json", result)
    assert "<svg" in render(collect(path))


def test_curves_of_candidates_taken_over_are_shown(run):
    report = read_json(run / "report.json")
    assert set(candidate_curves(report, "new_block")) == {"gated_delta_net", "jet", "jet_static"}
    assert set(candidate_curves(report, "block_selection")) == {"gla", "gated_delta_net", "jet"}


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "cannot be read as JSON"), ('{"stage": "placement"}', "placement/result.json: "), ("[]", "result.json: ")],
)
def test_broken_result_is_one_line_and_keeps_the_old_report(tmp_path, capsys, content, message):
    path = write_fake_run(tmp_path / "run", ("prepare",))
    build_report(path)
    before = (path / "report.json").read_bytes()
    broken = path / "stages" / "placement" / "result.json"
    broken.parent.mkdir(parents=True)
    broken.write_text(content)
    assert main([str(path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and len(error.strip().splitlines()) == 1
    assert (path / "report.json").read_bytes() == before


def test_not_a_run_directory(tmp_path, capsys):
    with pytest.raises(UserError, match="config.yaml: no such file"):
        collect(tmp_path)
    assert main([]) == 2 and main(["a", "b"]) == 2 and main(["--help"]) == 0
    assert "usage: " in capsys.readouterr().err


def test_full_disk_is_one_line(tmp_path, capsys, monkeypatch):
    path = write_fake_run(tmp_path / "run", ("prepare",))

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    assert main([str(path)]) == 1
    assert "the report cannot be written (No space left on device)" in capsys.readouterr().err
    assert not (path / "report.json").exists()


def test_build_command_needs_no_torch(tmp_path):
    path = write_fake_run(tmp_path / "run", ("prepare", "placement"))
    code = (
        "import sys, runpy\n"
        "for name in ('torch', 'megatron', 'transformers'): sys.modules[name] = None\n"
        f"sys.argv = ['build', {str(path)!r}]\n"
        "runpy.run_module('megatron_jet.evaluation.report.build', run_name='__main__')\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert f"report: {path / 'report.html'}" in result.stdout
    assert read_json(path / "report.json")["placement"]["full"] == list(FULL)


def test_number_formats():
    assert [size_text(n) for n in (0, 999, 16384, 2136 * 1024, 8 << 20, 1792 << 20)] == [
        "0 B",
        "999 B",
        "16 KiB",
        "2.09 MiB",
        "8 MiB",
        "1.75 GiB",
    ]
    assert [duration(s) for s in (8, 59.7, 148.2, 3599, 3600, 11100, 200_000)] == [
        "8 s",
        "1 min",
        "2 min 28 s",
        "59 min 59 s",
        "1 h",
        "3 h 5 min",
        "2 days 8 h",
    ]
    assert [signed(x) for x in (0.0001, -0.5, 0.016)] == ["0.000", "−0.500", "+0.016"]
