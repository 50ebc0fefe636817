"""Lists of strategies on the command line, and the runs that they plan."""

import sys

import pytest

import run
from utils.errors import OptionError, SceneError
from utils.variants import Variant, parse_variants

DEMO = ["--demo", "--n_iters", "5"]


def test_a_list_is_taken_apart_outside_brackets():
    variants = parse_variants("full, expansive:es_ratio=0.5:es_normalize ,full:upsamp_list=[2,3]")
    assert variants == [
        Variant("full"),
        Variant("expansive", (("es_ratio", "0.5"), ("es_normalize", ""))),
        Variant("full", (("upsamp_list", "[2,3]"),)),
    ]
    assert [v.tag for v in variants] == ["full", "expansive-es_ratio0.5-es_normalize", "full-upsamp_list2,3"]
    assert variants[1].arguments == ["--strategy", "expansive", "--es_ratio", "0.5", "--es_normalize"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("full,,egra", "is no strategy"),
        ("full:=3", "is no strategy"),
        ("full:batch_size=", "is no strategy"),
        ("full,egra,full", "full is there twice"),
        ("full:seed=3", "give it as --seed"),
        ("full:nerf_scene=chair", "give it as --nerf_scene"),
        ("expansive:save_dir=elsewhere", "give it as --save_dir"),
        ("full:lr_init=1,full:lr_init=!1", "is there twice"),
    ],
)
def test_malformed_lists_are_refused(text, says):
    with pytest.raises(OptionError, match=says):
        parse_variants(text)


def test_tags_keep_signs_and_points():
    variants = parse_variants("full:L1_weight_inital=2e-5,full:density_shift=-10,full:density_shift=10")
    assert [v.tag for v in variants] == ["full-L1_weight_inital2e-5", "full-density_shift-10", "full-density_shift10"]


def test_the_readmes_rows_are_named_as_the_runs_are():
    from benchmarks.readme_tables import ASKED_FIRST, FEWER_RAYS, MAIN

    entries = "full,egra,soft:soft_mining_grad=viewdir,soft,expansive,expansive:es_ratio=0.5,full:batch_size=512,"
    entries += "expansive:es_normalize,full:L1_weight_inital=2e-5:L1_weight_rest=1e-5,full:batch_size=1535"
    assert {*MAIN, *FEWER_RAYS, *ASKED_FIRST} == {v.tag for v in parse_variants(entries)}


def test_a_control_changes_what_its_entry_changes_besides():
    plan = planned("--compare", "--strategies", "expansive:es_ratio=0.5:lr_init=0.1:lamda_a=2", "--batch_size", "100")
    assert [(o.strategy, o.batch_size, o.lr_init) for o in plan] == [("expansive", 100, 0.1), ("full", 50, 0.1)]


def planned(*arguments):
    return run.planned_runs([*DEMO, *arguments], use_cuda=0)


def test_runs_multiply_over_strategies_and_seeds():
    plan = planned("--strategies", "full,egra", "--seeds", "2", "--seed", "5")
    assert [(o.tag, o.seed) for o in plan] == [("full", 5), ("egra", 5), ("full", 6), ("egra", 6)]
    assert not any(o.compare for o in plan)


def test_a_comparison_takes_all_four_strategies():
    assert [o.strategy for o in planned("--compare")] == ["full", "egra", "soft", "expansive"]


def test_fewer_rays_of_expansive_bring_their_control():
    plan = planned("--compare", "--strategies", "full,expansive:es_ratio=0.5", "--batch_size", "101")
    assert [(o.tag, o.strategy, o.batch_size) for o in plan] == [
        ("full", "full", 101),
        ("expansive-es_ratio0.5", "expansive", 101),
        ("full-batch_size50", "full", 50),
    ]
    assert len(planned("--strategies", "full,expansive:es_ratio=0.5")) == 2


def test_an_entrys_settings_win_over_the_command_line():
    plan = planned("--strategies", "full:batch_size=7,full", "--batch_size", "9")
    assert [o.batch_size for o in plan] == [7, 9]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--strategies", "full,nobody"], "--strategy nobody: no sampler"),
        (["--strategies", "full:batchsize=3"], "did you mean batch_size"),
        (["--strategies", "expansive:es_ratio=2"], "1 or less"),
        (["--compare", "--tag", "mine"], "--tag: several strategies"),
    ],
)
def test_what_is_wrong_with_an_entry_is_said_before_anything_is_trained(arguments, says):
    with pytest.raises(OptionError, match=says):
        planned(*arguments)


def test_a_comparison_is_trained_in_processes_of_their_own_and_redone_without_the_data(tmp_path, monkeypatch, capsys):
    arguments = "--nerf_dataset syn --nerf_scene tiny --compare --strategies full,expansive:es_ratio=0.5 --device cpu "
    arguments += "--n_iters 6 --batch_size 40 --N_voxel_init 1000 --N_voxel_final 1728 --upsamp_list [3] --featureC 8 "
    arguments += "--update_AlphaMask_list [2] --density_shift -4 --vis_every 3 --N_vis 2 --n_lamb_sigma [2,2,2] "
    arguments += f"--n_lamb_sh [2,2,2] --save_dir {tmp_path / 'log'} --data_folder {tmp_path / 'data'}"
    from dataLoader import scene_folder
    from dataLoader.demo_write import write_demo_as

    write_demo_as("syn", scene_folder("syn", tmp_path / "data", "tiny"), 20, n_train=5, n_test=2)
    monkeypatch.setattr(sys, "argv", ["run.py", *arguments.split()])
    assert run.exit_code(run.compare_strategies) == 0
    folder = tmp_path / "log/runs/syn/tiny/comparison"
    table = (folder / "table.md").read_text()
    assert all(f"| {tag} | 1 |" in table for tag in ("full", "expansive-es_ratio0.5", "full-batch_size20"))
    assert (tmp_path / "log/runs/syn/res_table.md").exists()

    import shutil

    shutil.rmtree(tmp_path / "data")
    shutil.rmtree(folder)
    assert run.exit_code(run.compare_strategies) == 0
    assert (folder / "table.md").read_text() == table
    assert (folder / "overview.png").exists()
    assert f"comparison: {folder}" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "log/runs/syn/tiny/full")
    with pytest.raises(SceneError, match="where to get"):
        run.planned_runs(arguments.split(), 0)
