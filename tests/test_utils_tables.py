"""The result tables: what a figure means, what is missing, and that every format says the same."""

import csv
import re

import pytest

import utils.tables
from opt import RUN_IDENTITY_EXEMPT
from utils.run_folder import run_folder, write_json_atomic
from utils.run_grid import NOT_COMPARED
from utils.table_formats import tex
from utils.tables import collect_results, write_tables


def add_run(root, scene, tag, seed, **values):
    folder = run_folder(str(root.parent), root.name, "syn", scene, tag, seed)
    folder.mkdir(parents=True)
    result = {"dataset": "syn", "scene": scene, "seed": seed, "n_iters": 100, "batch_size": 4096, "commit": "abc"}
    write_json_atomic(folder / "results.json", {**result, "device": "cpu", **values})
    return folder


def table(root):
    with open(root / "res_table.csv", newline="") as file:
        return {(row["scene"], row["tag"]): row for row in csv.DictReader(file)}


def markdown(root):
    """(cells by column name by (scene, tag), notes) of res_table.md."""
    lines = (root / "res_table.md").read_text().splitlines()
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("|")]
    cells = [dict(zip(head, row, strict=True)) for row in rows]
    return {(row["scene"], row["tag"]): row for row in cells}, [line for line in lines if line.startswith("- ")]


def figures(row, name):
    """(mean, deviation, how many) of a csv row; None where it is empty."""
    return tuple(float(row[f"{name}_{part}"]) if row[f"{name}_{part}"] else None for part in ("mean", "std", "n"))


@pytest.fixture
def root(tmp_path):
    return tmp_path / "paper"


@pytest.fixture
def grid(root):
    """Two scenes, two tags, two seeds, all finished; expansive is 1 and 2 dB better on lego, 3 and 5 on ship."""
    for scene, seed, psnr, gain in (("lego", 0, 30, 1), ("lego", 1, 32, 2), ("ship", 0, 21, 3), ("ship", 1, 20, 5)):
        add_run(root, scene, "full", seed, psnr=psnr, ssim=0.8, lpips_alex=0.2, train_seconds=60, peak_memory_mb=500)
        add_run(root, scene, "expansive", seed, psnr=psnr + gain, ssim=0.9, lpips_alex=0.1, train_seconds=80)
    return root


def test_a_row_is_the_mean_and_the_spread_over_seeds(root):
    for seed, psnr in enumerate((29.0, 30.0, 31.0)):
        add_run(root, "lego", "full", seed, psnr=psnr, ssim=0.9, lpips_alex=None, train_seconds=60)
    write_tables(root)
    row = table(root)["lego", "full"]
    assert figures(row, "psnr") == (30, 1, 3)
    assert figures(row, "ssim") == (pytest.approx(0.9), 0, 3)
    assert figures(row, "lpips_alex") == figures(row, "peak_memory_mb") == (None, None, 0)
    assert [row[key] for key in ("seeds", "seeds_missing")] == ["3", "0"]
    assert [row[key] for key in ("n_iters", "batch_size", "device", "commit")] == ["100", "4096", "cpu", "abc"]
    (cells,) = markdown(root)[0].values()
    assert (cells["PSNR"], cells["SSIM"], cells["train s"]) == ("30.00 +- 1.00", "0.9000 +- 0.0000", "60.0 +- 0.0")
    assert (cells["LPIPS alex"], cells["peak MB"], cells["PSNR - full"]) == ("n/a", "n/a", "")


def test_the_difference_to_full_is_that_of_the_same_scene_and_seed(grid):
    write_tables(grid)
    rows = table(grid)
    assert figures(rows["lego", "expansive"], "psnr_minus_full") == (1.5, pytest.approx(0.5**0.5), 2)
    assert figures(rows["ship", "expansive"], "psnr_minus_full") == (4, pytest.approx(2**0.5), 2)
    assert figures(rows["lego", "expansive"], "lpips_alex_minus_full")[0] == pytest.approx(-0.1)
    # Seed by seed over the scenes: 2 and 3.5. Pooled, the four differences would spread by 1.7, not 1.1.
    assert figures(rows["mean of 2", "expansive"], "psnr_minus_full") == (2.75, pytest.approx(1.5 / 2**0.5), 2)
    assert figures(rows["lego", "full"], "psnr_minus_full") == (None, None, 0)
    assert markdown(grid)[0]["mean of 2", "expansive"]["PSNR - full"] == "+2.75 +- 1.06"


def test_the_mean_over_scenes_is_taken_seed_by_seed(grid):
    write_tables(grid)
    row = table(grid)["mean of 2", "full"]
    assert figures(row, "psnr") == (25.75, pytest.approx(0.5 / 2**0.5), 2)  # 25.5 and 26: scenes do not spread
    assert list(table(grid)) == [(s, t) for s in ("lego", "ship", "mean of 2") for t in ("full", "expansive")]


def test_runs_that_are_missing_are_named_with_what_became_of_them(grid):
    (grid / "syn/lego/full/seed1/results.json").unlink()
    write_json_atomic(grid / "syn/lego/full/seed1/args.json", {})
    (grid / "syn/ship/expansive/seed0/results.json").unlink()
    write_json_atomic(grid / "syn/ship/expansive/seed0/failed.json", {"error": "ship: a|b\nis gone"})
    for seed in (0, 2):
        add_run(grid, "lego", "soft", seed, psnr=30.5)
    write_tables(grid)
    rows, notes = markdown(grid)
    assert [note for note in notes if "missing" in note] == [
        "- missing: lego, full, seed 1: started, not finished",
        "- missing: lego, full, seed 2: not started",
        "- missing: lego, expansive, seed 2: not started",
        "- missing: lego, soft, seed 1: not started",
        "- missing: ship, full, seed 2: not started",
        "- missing: ship, expansive, seed 0: failed: ship: a|b is gone",
        "- missing: ship, expansive, seed 2: not started",
        "- missing: ship, soft, seeds 0, 1, 2: not started",
    ]
    assert (rows["lego", "full"]["PSNR"], rows["lego", "full"]["seeds"]) == ("30.00 (1 of 3)", "1 of 3")
    assert rows["lego", "soft"]["PSNR - full"] == "+0.50 (1 of 3)"
    assert (rows["ship", "soft"]["PSNR"], rows["ship", "soft"]["seeds"]) == ("n/a", "0 of 3")
    # No seed of soft has both scenes; full has only seed 0 in both, expansive only seed 1.
    assert rows["mean of 2", "soft"]["PSNR"] == "n/a"
    assert rows["mean of 2", "full"]["PSNR"] == "25.50 (1 of 3)"
    assert rows["mean of 2", "expansive"]["PSNR"] == "29.50 (1 of 3)"
    assert rows["mean of 2", "expansive"]["PSNR - full"] == "n/a"
    assert [table(grid)["lego", "full"][key] for key in ("seeds", "seeds_missing")] == ["1", "2"]


def test_a_figure_that_some_seeds_lack_is_not_shown_as_whole(root):
    add_run(root, "lego", "full", 0, psnr=30.0, ssim=0.5)
    add_run(root, "lego", "full", 1, psnr=31.0, ssim=None)
    write_tables(root)
    (cells,) = markdown(root)[0].values()
    assert (cells["PSNR"], cells["SSIM"]) == ("30.50 +- 0.71", "0.5000 (1 of 2)")


def test_a_damaged_result_is_named_and_the_others_stay(root):
    add_run(root, "lego", "full", 0, psnr=30.0)
    for seed, content in ((1, '{"psnr": 3'), (2, "[]")):
        folder = add_run(root, "lego", "full", seed)
        (folder / "results.json").write_text(content)
    with pytest.warns(UserWarning, match="seed") as caught:
        results = collect_results(root)
    assert ["seed1" in str(caught[0].message), "seed2" in str(caught[1].message)] == [True, True]
    assert [(run["tag"], run["seed"], run["psnr"]) for run in results] == [("full", 0, 30.0)]
    with pytest.warns(UserWarning, match="seed"):
        write_tables(root)
    rows, notes = markdown(root)
    assert rows["lego", "full"]["PSNR"] == "30.00 (1 of 3)"
    assert notes == ["- missing: lego, full, seeds 1, 2: its results.json is damaged"]


@pytest.mark.parametrize("text", ['"30"', "true", "[]", "{}", "1e300", "1" + "0" * 400, "NaN", "-Infinity"])
def test_what_is_no_sensible_number_is_no_figure(root, text):
    path = add_run(root, "lego", "full", 0, ssim=0.5) / "results.json"
    path.write_text(path.read_text().replace("0.5", text))
    write_tables(root)
    assert figures(table(root)["lego", "full"], "ssim") == (None, None, 0)


def test_text_from_results_cannot_break_the_tables(root):
    folder = add_run(root, "lego", "full", 0, psnr=30.0, device="a|b\n% \\end{table}", commit={"x": "_"})
    assert folder.exists()
    write_tables(root)
    assert len(markdown(root)[0]) == 1
    assert r"a\|b % \\end{table}" in (root / "res_table.md").read_text()
    for line in (root / "res_table.tex").read_text().splitlines():
        assert not line.partition("\\\\ % ")[0].endswith("\\end{table}")


def test_runs_that_do_not_belong_together_are_pointed_out(grid):
    add_run(grid, "lego", "full", 2, device="a GPU", options={"lr_init": 0.1, "seed": 2})
    write_tables(grid)
    notes = markdown(grid)[1]
    assert "- careful: not all runs have the same device (a GPU, cpu)" in notes
    assert "- careful: the runs of lego, full do not have the same settings (lr_init)" in notes
    assert table(grid)["lego", "full"]["device"] == "a GPU, cpu"


def test_what_a_resumed_run_may_change_is_not_a_setting_of_its():
    assert RUN_IDENTITY_EXEMPT | {"seed"} == NOT_COMPARED


def test_settings_that_a_tag_does_not_tell_are_named_under_the_table(root):
    options = {"strategy": "full", "density_shift": -10.0, "es_ratio": 1.0, "save_every": 1000}
    changed = {"strategy": "expansive", "es_ratio": 0.5, "save_every": 7}
    for scene in ("lego", "ship"):
        add_run(root, scene, "full", 0, psnr=30.0, options=options)
        add_run(root, scene, "expansive-es_ratio0.5", 0, psnr=31.0, options=options | changed)
        add_run(root, scene, "egra", 0, psnr=32.0, options=options | {"strategy": "egra", "density_shift": -9.0})
    write_tables(root)
    rows, notes = markdown(root)
    assert notes == ["- careful: lego, ship: egra also differs from full in density_shift = -9.0"]
    assert rows["lego", "egra"]["PSNR - full"] == "+2.00"


@pytest.mark.parametrize(
    "other",
    [
        {"options": {"test_every": 8}},
        {"options": {"test_every": 1, "downsample_test": 2.0}},
        {"per_view": {"indices": [0, 8]}},
    ],
)
def test_there_is_no_difference_between_runs_scored_on_other_views(root, other):
    base = {"options": {"test_every": 1, "downsample_test": 1.0}, "per_view": {"indices": [0, 1]}}
    add_run(root, "lego", "full", 0, psnr=30.0, **base)
    add_run(root, "lego", "soft", 0, psnr=31.0, **base | other)
    add_run(root, "lego", "egra", 0, psnr=32.0, **base)
    write_tables(root)
    rows, notes = markdown(root)
    assert (rows["lego", "soft"]["PSNR - full"], rows["lego", "egra"]["PSNR - full"]) == ("n/a", "+2.00")
    (note,) = notes
    assert "soft" in note
    assert "scored on other views or pixels than full, so there is no difference to it" in note


def test_settings_are_compared_between_runs_of_one_seed(root):
    for seed, rate in ((0, 0.1), (1, 0.2), (2, 0.2)):
        add_run(root, "lego", "full", seed, psnr=30.0, options={"lr_init": rate})
    for seed, rate in ((1, 0.2), (2, 0.2)):
        add_run(root, "lego", "egra", seed, psnr=31.0, options={"lr_init": rate})
        add_run(root, "lego", "soft", seed, psnr=31.0, options={"lr_init": 0.1})
    add_run(root, "lego", "other", 3, psnr=31.0, options={"lr_init": 0.2})
    write_tables(root)
    told = [note for note in markdown(root)[1] if "differs" in note]
    # The first runs of a row without a shared seed are all that can be compared.
    assert told == [
        "- careful: lego: other also differs from full in lr_init = 0.2",
        "- careful: lego: soft also differs from full in lr_init = 0.1",
    ]


@pytest.mark.parametrize(
    ("other_seeds", "difference", "says"),
    [([], "+1.00 +- 0.00", None), ([1], "+1.00 (1 of 2)", "with seed 1 was"), ([0, 1], "n/a", "soft was")],
)
def test_a_row_is_said_to_be_scored_on_other_views_where_its_pairs_are(root, other_seeds, difference, says):
    for seed in (0, 1):
        add_run(root, "lego", "full", seed, psnr=30.0, per_view={"indices": [0, 1]})
        views = [0, 8] if seed in other_seeds else [0, 1]
        add_run(root, "lego", "soft", seed, psnr=31.0, per_view={"indices": views})
    write_tables(root)
    rows, notes = markdown(root)
    assert rows["lego", "soft"]["PSNR - full"] == difference
    assert len(notes) == (says is not None)
    for note in notes:
        assert f"{says} scored on other views or pixels than full, so there is no difference to it" in note


@pytest.mark.parametrize(
    ("names", "pixels", "difference"), [("ab", 1, "+1.00"), ("ac", 1, "n/a"), ("ab", 2, "n/a"), (None, 1, "n/a")]
)
def test_the_names_of_the_scored_views_count_and_not_how_they_were_chosen(root, names, pixels, difference):
    for tag, psnr, skips, scored, factor in (("full", 30.0, False, "ab", 1), ("soft", 31.0, True, names, pixels)):
        options = {"test_every": 1 + skips, "skip_missing_frames": skips, "downsample_test": factor}
        views = {"indices": [0, 1]} | ({"names": list(scored)} if scored else {})
        add_run(root, "lego", tag, 0, psnr=psnr, options=options, per_view=views)
    write_tables(root)
    assert markdown(root)[0]["lego", "soft"]["PSNR - full"] == difference


def test_runs_of_the_cp_decomposition_are_compared_with_their_own_full(root):
    for tag, psnr, model in (
        ("full", 33.0, "TensorVMSplit"),
        ("full_cp", 30.0, "TensorCP"),
        ("egra_cp", 31, "TensorCP"),
    ):
        add_run(root, "lego", tag, 0, psnr=psnr, model_name=model)
    write_tables(root)
    assert figures(table(root)["lego", "egra_cp"], "psnr_minus_full")[0] == 1
    assert markdown(root)[0]["lego", "full_cp"]["PSNR - full"] == ""


def test_a_table_of_no_results_has_no_rows(tmp_path):
    write_tables(tmp_path)
    assert table(tmp_path) == {}
    assert markdown(tmp_path) == ({}, [])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["res_table.csv", "res_table.md", "res_table.tex"]


def test_a_result_without_names_is_placed_by_its_folder(root):
    folder = root / "syn" / "lego" / "full" / "seed0"
    folder.mkdir(parents=True)
    write_json_atomic(folder / "results.json", {"psnr": 1.5})
    assert collect_results(root) == [
        {"dataset": "syn", "scene": "lego", "tag": "full", "psnr": 1.5, "folder": str(folder)}
    ]


def test_a_scene_may_be_called_like_a_seed(root):
    add_run(root, "seed7", "full", 0, psnr=30.0)
    write_tables(root)
    assert list(table(root)) == [("seed7", "full")]


def test_a_run_that_ends_while_tables_are_written_is_in_them(root, monkeypatch):
    add_run(root, "lego", "full", 0, psnr=30.0)
    true = utils.tables.csv_text

    def slow(rows):
        if not (root / "syn/lego/full/seed1").exists():
            add_run(root, "lego", "full", 1, psnr=31.0)
        return true(rows)

    monkeypatch.setattr(utils.tables, "csv_text", slow)
    write_tables(root)
    assert figures(table(root)["lego", "full"], "psnr")[0] == 30.5


# --- LaTeX ---
def tex_rows(root):
    """Cells of the body's rows, comments cut off, of a table whose structure is checked on the way."""
    text = re.sub(r"(?<!\\)%.*", "", (root / "res_table.tex").read_text())
    assert re.findall(r"\\(begin|end)\{(\w+\*?)\}", text) == [
        ("begin", "table*"),
        ("begin", "tabular"),
        ("end", "tabular"),
        ("end", "table*"),
    ]
    assert len(re.findall(r"(?<!\\)\{", text)) == len(re.findall(r"(?<!\\)\}", text))
    assert len(re.findall(r"(?<!\\)\$", text)) % 2 == 0
    columns = re.search(r"tabular\}\{(l+r*)\}", text)[1]
    rows = [re.split(r"(?<!\\)&", row.split("rule")[-1]) for row in text.split(r"\\")[:-1]]
    assert {len(row) for row in rows} == {len(columns)}
    return [[cell.strip() for cell in row] for row in rows[1:]]


def test_the_best_of_a_scene_is_bold_and_columns_without_figures_are_left_out(grid):
    write_tables(grid)
    rows = tex_rows(grid)
    assert rows[0][:4] == ["lego", "full", r"$31.00 \pm 1.41$", "--"]
    assert rows[0][4:] == [r"$0.800 \pm 0.000$", r"$0.200 \pm 0.000$", r"$\mathbf{60} \pm 0$", r"$500 \pm 0$"]
    assert rows[1][:4] == ["", "expansive", r"$\mathbf{32.50} \pm 2.12$", r"$+1.50 \pm 0.71$"]
    assert rows[1][4:] == [r"$\mathbf{0.900} \pm 0.000$", r"$\mathbf{0.100} \pm 0.000$", r"$80 \pm 0$", "n/a"]
    assert rows[4][0] == "mean of 2"
    text = (grid / "res_table.tex").read_text()
    assert "vgg" not in text
    assert r"\\ % seeds 2 of 2; n_iters 100; batch_size 4096; device cpu; commit abc" in text


def test_what_looks_alike_in_print_is_bold_alike(root):
    for tag, ssim in (("full", 0.91234), ("egra", 0.91189), ("soft", 0.9114)):
        add_run(root, "lego", tag, 0, psnr=30.0, ssim=ssim)
    write_tables(root)
    assert {row[1]: "mathbf" in row[4] for row in tex_rows(root)} == {"full": True, "egra": True, "soft": False}


def test_fewer_seeds_or_another_device_win_nothing(grid):
    add_run(grid, "lego", "full", 2, psnr=30.0, train_seconds=70)
    add_run(grid, "ship", "egra", 0, psnr=99.0, train_seconds=1, device="a GPU")
    add_run(grid, "ship", "egra", 1, train_seconds=1, device="a GPU")
    write_tables(grid)
    rows = {row[1]: row for row in tex_rows(grid)[3:6]}
    assert rows["egra (2/3)"][2] == "$99.00$ (1/3)"
    assert rows["egra (2/3)"][6] == r"$1 \pm 0$"
    assert not any("mathbf" in cell for row in rows.values() for cell in row)


@pytest.mark.parametrize("character", list("_%&#${}~^\\<>|"))
def test_characters_that_mean_something_to_latex_are_escaped(root, character):
    assert tex(f"a{character}b") not in (f"a{character}b", "ab")
    add_run(root, "le_go", f"full-x{character}".replace("\\", ""), 0, psnr=30.0)
    write_tables(root)
    assert tex_rows(root)[0][0] == r"le\_go"
