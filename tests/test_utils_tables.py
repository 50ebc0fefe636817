import csv

import pytest

from utils.run_folder import run_folder, write_json_atomic
from utils.tables import COLUMNS, collect_results, write_tables


def add_run(root, scene, tag, seed, **values):
    folder = run_folder(str(root.parent), root.name, "syn", scene, tag, seed)
    folder.mkdir(parents=True)
    result = {"dataset": "syn", "scene": scene, "seed": seed, "n_iters": 100, "batch_size": 4096, "commit": "abc"}
    write_json_atomic(folder / "results.json", {**result, "device": "cpu", **values})
    return folder


def table(root):
    with open(root / "res_table.csv", newline="") as file:
        return {(row["scene"], row["tag"]): row for row in csv.DictReader(file)}


@pytest.fixture
def root(tmp_path):
    return tmp_path / "paper"


def test_a_row_is_the_mean_and_the_spread_over_seeds(root):
    for seed, psnr in enumerate((29.0, 30.0, 31.0)):
        add_run(root, "lego", "full", seed, psnr=psnr, ssim=0.9, lpips_alex=None, train_seconds=60)
    write_tables(root)
    row = table(root)["lego", "full"]
    assert row["psnr"] == "30.00 +- 1.00"
    assert row["ssim"] == "0.9000 +- 0.0000"
    assert row["lpips_alex"] == "n/a"
    assert row["peak_memory_mb"] == "n/a"
    assert (row["seeds"], row["n_iters"], row["batch_size"], row["device"]) == ("3", "100", "4096", "cpu")


def test_the_mean_row_of_a_tag_is_the_mean_of_its_scenes_means(root):
    add_run(root, "lego", "full", 0, psnr=30.0, ssim=0.9)
    add_run(root, "lego", "full", 1, psnr=32.0, ssim=0.9)
    add_run(root, "ship", "full", 0, psnr=21.0, ssim=None, commit="def")
    add_run(root, "ship", "soft", 0, psnr=22.0)
    write_tables(root)
    rows = table(root)
    assert rows["mean of 2", "full"]["psnr"] == "26.00"
    assert rows["mean of 2", "full"]["ssim"] == "n/a"
    assert rows["mean of 2", "full"]["commit"] == "abc, def"
    assert rows["mean of 1", "soft"]["psnr"] == "22.00"
    assert rows["ship", "soft"]["psnr"] == "22.00"


def test_a_damaged_result_is_named_and_the_others_stay(root):
    add_run(root, "lego", "full", 0, psnr=30.0)
    for seed, content in ((1, '{"psnr": 3'), (2, "[]")):
        folder = add_run(root, "lego", "full", seed)
        (folder / "results.json").write_text(content)
    with pytest.warns(UserWarning, match="seed") as caught:
        results = collect_results(root)
    assert ["seed1" in str(caught[0].message), "seed2" in str(caught[1].message)] == [True, True]
    assert [(run["tag"], run["seed"], run["psnr"]) for run in results] == [("full", 0, 30.0)]


def test_the_markdown_has_a_header_and_every_row_its_columns(root):
    add_run(root, "lego", "full", 0, psnr=30.0, device="a|b")
    write_tables(root)
    lines = (root / "res_table.md").read_text().splitlines()
    assert lines[0] == "| " + " | ".join(COLUMNS) + " |"
    assert len(lines) == 4
    assert {line.replace("\\|", "").count("|") for line in lines} == {len(COLUMNS) + 1}


def test_a_table_of_no_results_has_no_rows(tmp_path):
    write_tables(tmp_path)
    assert len((tmp_path / "res_table.md").read_text().splitlines()) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["res_table.csv", "res_table.md"]


def test_a_result_without_names_is_placed_by_its_folder(root):
    folder = root / "syn" / "lego" / "full" / "seed0"
    folder.mkdir(parents=True)
    write_json_atomic(folder / "results.json", {"psnr": 1.5})
    assert collect_results(root) == [
        {"dataset": "syn", "scene": "lego", "tag": "full", "psnr": 1.5, "folder": str(folder)}
    ]
