"""Every option with its one default, the layers it may come from, and the checks; nothing else parses.

Layers, later wins: the defaults below -> configs/{nerf_dataset}.txt (with --model_name TensorCP also
configs/{nerf_dataset}_cp.txt, where there is one) -> the files given with --config, in order -> the command line.
A scene's file therefore names its data set and its scene, and beyond that only what differs.
"""

import argparse
import copy
import difflib
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import configargparse

from utils.errors import OptionError
from utils.files import is_regular, read_bounded, reason
from utils.variants import EXAMPLE

REPOSITORY = Path(__file__).resolve().parent
COMMAND_LINE = "command line"
# Characters of a value that a message shows, items of a list, bytes of a config file: far more than any real one has.
MAX_SHOWN, MAX_ITEMS, MAX_FILE_BYTES = 80, 1000, 2**16
EXAMPLE_SCENES = {"syn": "lego", "nsvf": "Wineholder", "tt": "Truck", "llff": "flower", "own_data": "my_scene"}


# --- kinds of values -------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Kind:
    """How one value is written: `parse` turns text into the value or raises ArgumentTypeError with a remedy."""

    metavar: str
    parse: Callable[[str], Any]


def _refuse(message: str) -> argparse.ArgumentTypeError:
    return argparse.ArgumentTypeError(message)


def _cut(text: str) -> str:
    """A value for a message: not more than its beginning."""
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 4]} ..."


def whole(minimum: int, maximum: int = 10**9) -> Kind:
    """A whole number from `minimum` to `maximum`."""

    def parse(text: str) -> int:
        if not re.fullmatch(r"[+-]?\d+", text.strip()):
            raise _refuse(f"'{_cut(text)}' is not a whole number; write digits only, for example 30000")
        # Python converts no more than some thousand digits.
        if len(text) > 100 or int(text) > maximum:
            raise _refuse(f"{_cut(text)} is out of range; give {maximum} or less")
        if int(text) < minimum:
            raise _refuse(f"{text} is too small; give {minimum} or more")
        return int(text)

    return Kind("N", parse)


def number(minimum: float = -math.inf, above: float = -math.inf, maximum: float = math.inf) -> Kind:
    """A finite number, `minimum` or more, greater than `above`, `maximum` or less."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise _refuse(f"'{_cut(text)}' is not a number; write for example 0.02 or 1e-4") from None
        if not math.isfinite(value) or value < minimum or value <= above or value > maximum:
            bound = (
                f" above {above:g}" if above > -math.inf else f", {minimum:g} or more" if minimum > -math.inf else ""
            )
            bound += f", {maximum:g} or less" if maximum < math.inf else ""
            raise _refuse(f"{_cut(text)} is out of range; give a finite number{bound}")
        return value

    return Kind("X", parse)


def share(above: float = -math.inf) -> Kind:
    """A number from 0 to 1, greater than `above`."""

    def parse(text: str) -> float:
        value = number(0, above).parse(text)
        if value > 1:
            raise _refuse(f"{text} is out of range; give 1 or less")
        return value

    return Kind("X", parse)


def list_of(item: Kind, example: str) -> Kind:
    """A list in square brackets; `example` shows in messages how it is written."""

    def parse(text: str) -> list:
        inside = re.fullmatch(r"\[(.*)\]", text.strip())
        if not inside:
            raise _refuse(f"'{_cut(text)}' is not a list; write it in brackets with commas, for example {example}")
        parts = inside.group(1).split(",")
        if len(parts) > MAX_ITEMS:
            raise _refuse(f"{_cut(text)} has {len(parts)} numbers; give {MAX_ITEMS} at most")
        return [item.parse(part.strip()) for part in parts] if inside.group(1).strip() else []

    return Kind(example, parse)


def one_of(*names: str) -> Kind:
    """One of `names`."""

    def parse(text: str) -> str:
        if text not in names:
            raise _refuse(f"'{_cut(text)}' is not one of {', '.join(names)}{_suggestion(text, names)}")
        return text

    return Kind("{" + ",".join(names) + "}", parse)


def several_of(names: Sequence[str], example: str) -> Kind:
    """Some of `names`, with commas, none of them twice."""

    def parse(text: str) -> list[str]:
        words = [one_of(*names).parse(word.strip()) for word in text.split(",")]
        if len(set(words)) < len(words):
            raise _refuse(f"'{_cut(text)}' names one of them twice; keep one")
        return words

    return Kind(example, parse)


def matching(pattern: str, metavar: str, remedy: str) -> Kind:
    """Text that matches `pattern` as a whole; `remedy` says what may be written."""

    def parse(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise _refuse(f"'{_cut(text)}' cannot be used; {remedy}")
        return text

    return Kind(metavar, parse)


def _parse_flag(text: str) -> bool:
    if text.lower() not in ("true", "false", "1", "0"):
        raise _refuse(f"'{_cut(text)}' is not true or false; the option is a flag")
    return text.lower() in ("true", "1")


def _parse_switch(text: str) -> int:
    if text not in ("0", "1"):
        raise _refuse(f"'{_cut(text)}' is not 0 or 1")
    return int(text)


def _parse_shard(text: str) -> str:
    parts = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if not parts or int(parts[1]) >= int(parts[2]):
        raise _refuse(f"'{_cut(text)}' is no part of a sweep; write i/n with i from 0 to n - 1, for example 0/4")
    return text


def _suggestion(word: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, names, n=2, cutoff=0.6)
    return f": did you mean {' or '.join(close)}?" if close else ""


FLAG = Kind("true", _parse_flag)
SWITCH = Kind("{0,1}", _parse_switch)
# No control characters, which no name of ours has and some of which no file can have; no longer than systems permit.
PATH = matching(r"[^\x00-\x1f\x7f]{1,1000}", "PATH", "give a path")
NAME = matching(r"(?!\.+$)[^/\\:\x00-\x1f\x7f]{1,80}", "NAME", "it names a folder: leave out / \\ and :, 80 characters")
DEVICE = matching(r"auto|cpu|cuda(:\d+)?", "DEVICE", "write auto, cpu, cuda or cuda:N")
DATASETS = ("syn", "nsvf", "tt", "llff", "own_data", "demo")
DATASET = one_of(*DATASETS)
GPUS = matching(r"all|\d{1,4}(,\d{1,4}){0,99}", "all|0,1", "write all, or numbers with commas, for example 0,1")
SHARD = Kind("i/n", _parse_shard)


# --- the options -----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Option:
    """One option; a default of None may also be written as `None`."""

    name: str
    kind: Kind
    default: Any
    help: str


OPTIONS = {
    "run": (
        Option("config", PATH, [], "config file of `name = value` lines; repeatable, a later one wins"),
        Option("demo", FLAG, False, "train on the built-in demo scene, which needs no data (= --nerf_dataset demo)"),
        Option("seed", whole(0, 10**18 - 1), 20211202, "seed of every random choice of the run"),
        Option("save_dir", PATH, "./log", "where runs are kept: save_dir/up_folder_name/dataset/scene/tag/seedN"),
        Option("up_folder_name", NAME, "runs", "folder below save_dir"),
        Option("tag", NAME, "", "name of the run's folder; default: the strategy, with _cp for TensorCP"),
        Option("check_only", FLAG, False, "only look at scenes, options and the machine, and say all that is wrong"),
        Option("overwrite", FLAG, False, "start afresh where a run exists, instead of resuming it"),
        Option("debug", FLAG, False, "full tracebacks for every error, and torch's anomaly detection"),
        Option("device", DEVICE, "auto", "cpu, cuda, cuda:N; auto: CUDA where there is one"),
        Option(
            "cuda_graphs", one_of("auto", "0", "1"), "auto", "replay training steps as CUDA graphs; auto: if possible"
        ),
    ),
    "several runs": (
        Option("seeds", whole(1, 1000), 1, "how many runs: seed .. seed + N - 1"),
        Option(
            "strategies",
            matching(r".{1,4000}", EXAMPLE, f"write for example {EXAMPLE}"),
            None,
            "each of these by itself",
        ),
        Option("multi_data", FLAG, False, "run every scene found of the data set"),
        Option("datasets", several_of(DATASETS, "syn,nsvf"), None, "run every scene found of these data sets"),
        Option("compare", FLAG, False, "the strategies (default: all four), with tables and figures side by side"),
        Option("dry_run", FLAG, False, "only say what would run, and what state each run is in"),
        Option("retry_failed", FLAG, False, "start runs again that failed before"),
        Option("shard", SHARD, None, "only part i of n of the runs, i = 0 .. n - 1"),
        Option("gpus", GPUS, None, "one run at a time on each of these CUDA devices: all, or numbers with commas"),
        Option("jobs", whole(1), 1, "runs at a time where gpus is not given"),
        Option("launcher", one_of("local", "ray"), "local", "where runs go: this machine, or those of a Ray cluster"),
    ),
    "data": (
        Option("data_folder", PATH, "./data", "folder that holds nerf_synthetic, Synthetic_NSVF, ..."),
        Option("nerf_dataset", DATASET, "syn", "format of the data set"),
        Option("nerf_scene", NAME, None, "the scene's folder in the data set, for example lego"),
        Option(
            "downsample_train",
            number(1, maximum=1e4),
            1.0,
            "shrink training images by this factor, intrinsics with them",
        ),
        Option("downsample_test", number(1, maximum=1e4), None, "the same for test images; default: downsample_train"),
        Option("scene_bbox", list_of(number(), "[-1,-1,-1,1,1,1]"), None, "box [x0,y0,z0,x1,y1,z1] in world units"),
        Option("skip_missing_frames", FLAG, False, "train on the images that exist, instead of refusing the scene"),
        Option("filter_rays", SWITCH, 0, "1: drop rays that miss the box, and later the alpha mask (TensoRF)"),
        Option("demo_resolution", whole(8), 200, "side of the demo scene's images, pixels"),
    ),
    "choice of rays": (
        Option("strategy", NAME, "full", "sampler of training pixels: full, egra, soft, expansive, or your own"),
        Option("batch_size", whole(1), 4096, "rays a step"),
        Option("egra_refresh", whole(0), 0, "egra: steps after which edges are shifted anew; 0: never"),
        Option("soft_mining_alpha", share(), 0.6, "soft: exponent of the importance correction after the warm-up"),
        Option("soft_mining_warmup", whole(0), 1000, "soft: the exponent is step / this until it reaches its end"),
        Option("soft_mining_a", number(0), 20.0, "soft: size of a walker's drift"),
        Option("soft_mining_b", number(0), 0.02, "soft: size of its noise, in pictures"),
        Option("soft_mining_grad", one_of("true", "viewdir"), "true", "soft: whole gradient, or the reference's part"),
        Option("wo_correction_loss", FLAG, False, "soft: leave the importance correction out"),
        Option("es_ratio", share(above=0), 1.0, "expansive: rays a step, as a part of batch_size"),
        Option("es_beta_a", share(), 0.5, "expansive: part of these that are anchors (edge pixels)"),
        Option("lamda_a", number(0), 1.0, "expansive: weight of the anchors' error"),
        Option("lamda_s", number(0), 1.0, "expansive: weight of the sources' error"),
        Option("a_s_add", FLAG, False, "expansive: do not expand the sources' error, c(t) = 1"),
        Option("use_mse", FLAG, False, "expansive: plain mean squared error over anchors and sources"),
        Option("es_normalize", FLAG, False, "expansive: divide the loss by 1 + c(t), as the regularisers expect"),
        Option("es_search", one_of("reference", "bisect"), "reference", "expansive: how edge thresholds are found"),
    ),
    "field": (
        Option("nerf_backbone", one_of("tensorf"), "tensorf", "kind of field"),
        Option("model_name", one_of("TensorVMSplit", "TensorCP"), "TensorVMSplit", "decomposition of the grids"),
        Option(
            "n_lamb_sigma", list_of(whole(1, 10**5), "[16,16,16]"), [16, 16, 16], "density components a mode; CP: [96]"
        ),
        Option(
            "n_lamb_sh", list_of(whole(1, 10**5), "[48,48,48]"), [48, 48, 48], "appearance components a mode; CP: [288]"
        ),
        Option("data_dim_color", whole(1, 10**5), 27, "length of the appearance feature"),
        Option("mlp_dtype", one_of("float32", "bfloat16"), "float32", "precision of the colour network's products"),
        Option("fea2denseAct", one_of("softplus", "relu"), "softplus", "density feature to density"),
        Option("density_shift", number(-1e30, maximum=1e30), -10.0, "added to the density feature before softplus"),
        Option(
            "distance_scale",
            number(above=0, maximum=1e30),
            25.0,
            "factor on sample distances in alpha = 1 - exp(-sigma d)",
        ),
        Option("shadingMode", one_of("MLP_Fea", "MLP", "MLP_PE", "SH", "RGB"), "MLP_Fea", "feature to colour"),
        Option("pos_pe", whole(0, 32), 6, "frequencies of the position's encoding (MLP_PE)"),
        Option("view_pe", whole(0, 32), 6, "frequencies of the view direction's encoding"),
        Option("fea_pe", whole(0, 32), 6, "frequencies of the features' encoding (MLP_Fea)"),
        Option("featureC", whole(1, 10**5), 128, "width of the shading network"),
        Option("rm_weight_mask_thre", number(0, maximum=1e30), 1e-4, "samples of less weight get no colour"),
        Option("alpha_mask_thre", number(0, maximum=1e30), 1e-4, "grid points of less alpha are masked away"),
        Option("nSamples", whole(1), 1000000, "most samples a ray"),
        Option("step_ratio", number(above=0, maximum=1e3), 0.5, "sample distance in grid cells"),
        Option("N_voxel_init", whole(8, 10**12), 2097156, "voxels of the first grid"),
        Option("N_voxel_final", whole(8, 10**12), 27000000, "voxels after the last upsampling"),
        Option("upsamp_list", list_of(whole(0), "[2000,3000]"), [2000, 3000, 4000, 5500, 7000], "when the grid grows"),
        Option("update_AlphaMask_list", list_of(whole(0), "[2000,4000]"), [2000, 4000], "when the mask is made"),
        Option("ndc_ray", SWITCH, None, "rays in NDC; default: as the data set, which is 1 for llff only"),
    ),
    "optimisation": (
        Option("n_iters", whole(1), 30000, "training steps"),
        Option("lr_init", number(above=0), 0.02, "learning rate of the grids"),
        Option("lr_basis", number(above=0), 1e-3, "learning rate of the networks and the basis layer"),
        Option("lr_decay_iters", whole(-1), -1, "steps in which rates fall by lr_decay_target_ratio; -1: n_iters"),
        Option("lr_decay_target_ratio", number(above=0), 0.1, "factor on learning rates after lr_decay_iters steps"),
        Option("lr_upsample_reset", SWITCH, 1, "1: back to the initial learning rates at every upsampling"),
        Option("L1_weight_inital", number(0), 0.0, "L1 on the density grids until the first mask update"),
        Option("L1_weight_rest", number(0), 0.0, "L1 on the density grids after it"),
        Option("Ortho_weight", number(0), 0.0, "penalty on correlated components"),
        Option("TV_weight_density", number(0), 0.0, "total variation of the density grids"),
        Option("TV_weight_app", number(0), 0.0, "total variation of the appearance grids"),
    ),
    "evaluation and output": (
        Option("N_vis", whole(-1), 5, "test views of an evaluation while training; -1: all"),
        Option("vis_every", whole(1), 5000, "steps between these evaluations"),
        Option("test_every", whole(1), 1, "score every N-th test view only; 1: all of them"),
        Option("render_test", SWITCH, 1, "1: render and score all test views at the end"),
        Option("render_train", SWITCH, 0, "1: render and score the training views at the end"),
        Option("render_path", SWITCH, 0, "1: render a video along the data set's camera path"),
        Option("render_only", SWITCH, 0, "1: no training, only what render_* and export_* ask for"),
        Option("export_mesh", SWITCH, 0, "1: write the density's surface as mesh.ply"),
        Option("export_tensorf", PATH, None, "write the field as a TensoRF checkpoint to this file"),
        Option("ckpt", PATH, None, "checkpoint to start from; default: the run's own last one"),
        Option("lpips_weights", PATH, None, "folder with the LPIPS backbones, where they are not in torch's cache"),
        Option("progress_refresh_rate", whole(1), 10, "steps between updates of the progress bar and the log"),
        Option("save_every", whole(1), 1000, "steps between checkpoints"),
        Option("eval_chunk", whole(0), 0, "rays rendered at once in evaluations; 0: 8192, on CUDA by free memory"),
    ),
}
BY_NAME = {option.name: option for group in OPTIONS.values() for option in group}

# What may differ between a run and its resumption: where things lie, what is shown and how often; not the result, and
# not the views that it is scored on.
RUN_IDENTITY_EXEMPT = frozenset(
    {option.name for group in ("run", "several runs", "evaluation and output") for option in OPTIONS[group]}
    - {"seed", "ckpt", "test_every"}
    | {"data_folder"}
)

ONLY_ON_COMMAND_LINE = {
    "config": "a config file cannot name another one: delete the line and give both with --config",
    "demo": "write nerf_dataset = demo",
    "debug": "delete the line and give --debug on the command line",
}
TENSORF_DATASETS = {"blender": "syn", "llff": "llff", "nsvf": "nsvf", "tankstemple": "tt", "own_data": "own_data"}
WITHOUT_EFFECT = {"lindisp", "perturb", "accumulate_decay", "idx_view", "with_depth", "white_bkgd", "add_timestamp"}


# --- reading layers --------------------------------------------------------------------------------------------------
class _ConfigFile(configargparse.ConfigFileParser):
    """`name = value` lines; a comment starts with # or ; at the line's start or after a blank."""

    def parse(self, stream) -> dict[str, str]:
        items: dict[str, str] = {}
        for line_number, line in enumerate(stream, 1):
            line = re.split(r"(?:^|\s)[#;]", line.strip(), maxsplit=1)[0].strip()
            if not line:
                continue
            match = re.fullmatch(r"([A-Za-z]\w*)\s*=\s*(.+)", line)
            if not match:
                raise configargparse.ConfigFileParserException(
                    f"line {line_number}, '{_cut(line)}': write name = value"
                )
            if match[1] in ("h", "help"):
                raise configargparse.ConfigFileParserException(
                    f"line {line_number}: {match[1]} belongs on the command line"
                )
            if match[1] in items:
                raise configargparse.ConfigFileParserException(
                    f"{_cut(match[1])} is given twice, again in line {line_number}: keep one "
                    "(lists are written [16,16,16])"
                )
            items[match[1]] = match[2]
        return items


class _Parser(configargparse.ArgumentParser):
    """Parses one layer at a time; `source` names it in messages."""

    source = COMMAND_LINE

    def error(self, message: str) -> None:
        message = message.removeprefix("argument --").replace("expected one argument", "needs a value after it")
        raise OptionError(f"{self.source}: {message}")


def _build_parser() -> _Parser:
    parser = _Parser(
        prog="run.py",
        usage="python run.py [--option value ...]",
        description="Train a radiance field with one way of choosing training rays. Options may also stand in config "
        "files as `name = value`; later wins: defaults, configs/{nerf_dataset}.txt, --config files, command line.",
        config_file_parser_class=_ConfigFile,
        allow_abbrev=False,
    )
    for title, group in OPTIONS.items():
        section = parser.add_argument_group(title)
        for option in group:
            default = "" if option.default in (None, "", []) or option.kind is FLAG else f" (default: {option.default})"
            section.add_argument(f"--{option.name}", help=option.help + default, **_argparse_settings(option))
    return parser


def _argparse_settings(option: Option) -> dict[str, Any]:
    settings = {"default": argparse.SUPPRESS, "type": option.kind.parse, "metavar": option.kind.metavar}
    if option.kind in (FLAG, SWITCH):
        settings |= {"nargs": "?", "const": option.kind.parse("1")}
    if option.name == "config":
        settings |= {"action": "append"}
    if option.default is None:
        settings["type"] = lambda text: None if text == "None" else option.kind.parse(text)
    return settings


@dataclass(frozen=True)
class _Layer:
    """Values by option name, and where they were written."""

    source: str
    values: dict[str, Any]


def _read_command_line(parser: _Parser, argv: Sequence[str]) -> _Layer:
    parser.source = COMMAND_LINE
    found, unknown = parser.parse_known_args(_join_lists(argv), env_vars={})
    _refuse_unknown(unknown, COMMAND_LINE)
    return _Layer(COMMAND_LINE, vars(found))


def _read_file(parser: _Parser, name: str, folders: Sequence[Path] = (Path(), REPOSITORY)) -> _Layer:
    """The layer of a config file; a relative name counts from the working folder, then from the repository."""
    path = next((folder / name for folder in folders if is_regular(folder / name)), None)
    if path is None:
        known = sorted(p.relative_to(REPOSITORY).as_posix() for p in (REPOSITORY / "configs").rglob("*.txt"))
        hint = _suggestion(name, known) or ": give a file, for example configs/lego.txt"
        raise OptionError(f"--config {name}: there is no such file{hint}")
    try:
        text = read_bounded(path, MAX_FILE_BYTES).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"{name}: cannot be read as a text file ({reason(error)}); write it anew in UTF-8") from error
    parser.source = name
    found, unknown = parser.parse_known_args([], config_file_contents=text, env_vars={})
    _refuse_unknown(unknown, name)
    for key, remedy in ONLY_ON_COMMAND_LINE.items():
        if hasattr(found, key):
            raise OptionError(f"{name}: {key}: {remedy}")
    return _Layer(name, vars(found))


def _join_lists(argv: Sequence[str]) -> list[str]:
    """Put together lists that the shell took apart at their blanks: `[16,` `16,` `16]`."""
    words: list[str] = []
    for word in argv:
        if words and _opens_list(words[-1]) and not word.startswith("--"):
            words[-1] += f" {word}"
        else:
            words.append(word)
    return words


def _opens_list(word: str) -> bool:
    """Whether a list begins in the word, at its start or after =, and does not end there."""
    tail = word[word.rfind("]") + 1 :]
    return "=[" in tail or (tail == word and word.startswith("["))


def _refuse_unknown(words: Sequence[str], source: str) -> None:
    if not words:
        return
    if not words[0].startswith("-"):
        raise OptionError(f"{source}: '{_cut(words[0])}' belongs to no option; write --name value")
    name, _, value = words[0].lstrip("-").partition("=")
    if not value and len(words) > 1:
        value = words[1]
    raise OptionError(f"{source}: {_cut(name)}: {_unknown_remedy(_cut(name), _cut(value))}")


def _unknown_remedy(name: str, value: str) -> str:
    if name == "datadir":
        folder = Path(value or "data/nerf_synthetic/lego")
        return f"is TensoRF's name; here it is data_folder = {folder.parent.parent} and nerf_scene = {folder.name}"
    if name == "dataset_name":
        ours = TENSORF_DATASETS.get(value)
        return f"is TensoRF's name; here it is nerf_dataset = {ours or '(one of ' + DATASET.metavar[1:-1] + ')'}"
    if name in ("expname", "basedir"):
        return f"is TensoRF's name; here it is {'tag' if name == 'expname' else 'save_dir'} = {value}"
    if name == "use_cuda":
        return (
            f"is an argument of the functions in run.py; here it is device = cuda:{value if value.isdecimal() else 0}"
        )
    if name in WITHOUT_EFFECT:
        return "has no effect here; delete it"
    return f"is no option{_suggestion(name, list(BY_NAME)) or '; run.py --help lists them all'}"


# --- putting layers together -----------------------------------------------------------------------------------------
def parse_options(argv: Sequence[str]) -> argparse.Namespace:
    """The resolved options of a command line (without the program's name), files and defaults beneath it.

    Raises OptionError, one line with the option, where it was written and the remedy, for anything unknown,
    malformed or contradictory. `--help` prints and exits. What None stands for is resolved (tag, downsample_test,
    ndc_ray, the demo's scene; components of TensorCP become one number), except where None means "not given".
    """
    parser = _build_parser()
    command = _read_command_line(parser, argv)
    _apply_demo(command)
    given = [*(_read_file(parser, name) for name in command.values.get("config", [])), command]
    defaults = _Layer("default", {name: copy.deepcopy(option.default) for name, option in BY_NAME.items()})
    layers = [defaults, *given]
    dataset = _merge(layers)[0]["nerf_dataset"]
    layers.insert(1, _read_file(parser, f"configs/{dataset}.txt", [REPOSITORY]))
    if _merge(layers)[0]["model_name"] == "TensorCP" and (REPOSITORY / f"configs/{dataset}_cp.txt").is_file():
        layers.insert(2, _read_file(parser, f"configs/{dataset}_cp.txt", [REPOSITORY]))
    values, sources = _merge(layers)
    _check(values, sources)
    _resolve(values)
    return argparse.Namespace(**values)


def resolved_dict(options: argparse.Namespace) -> dict[str, Any]:
    """The options as plain values that JSON can hold, in the order of the table above; the content of args.json."""
    return {name: copy.deepcopy(getattr(options, name)) for name in BY_NAME}


def schedule_notes(options: argparse.Namespace) -> list[str]:
    """A line for each schedule with steps that n_iters never reaches."""
    notes = []
    for name, what in (("upsamp_list", "the grid does not grow"), ("update_AlphaMask_list", "no alpha mask is made")):
        missed = [step for step in getattr(options, name) if step >= options.n_iters]
        if missed:
            steps = f"{name}'s {', '.join(map(str, missed))}"
            reached = f"n_iters = {options.n_iters} never reaches {steps}"
            notes.append(f"{reached}: {what} there; give --{name} earlier steps if that is not meant")
    return notes


def _apply_demo(command: _Layer) -> None:
    if command.values.get("demo"):
        named = command.values.setdefault("nerf_dataset", "demo")
        if named != "demo":
            raise OptionError(f"{COMMAND_LINE}: demo contradicts nerf_dataset = {named}; give one of them")


def _merge(layers: Sequence[_Layer]) -> tuple[dict[str, Any], dict[str, str]]:
    """(values, sources) by option name, later layers winning. A layer that names another data set than those
    below it takes their scene away: a scene belongs to its data set."""
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for layer in layers:
        if values.get("nerf_scene") and layer.values.get("nerf_dataset") not in (None, values["nerf_dataset"]):
            values["nerf_scene"], sources["nerf_scene"] = None, layer.source
        values |= layer.values
        sources |= dict.fromkeys(layer.values, layer.source)
    return values, sources


def _demo_scene(values: dict[str, Any]) -> str:
    return f"shapes_{values['demo_resolution']}"


def _resolve(values: dict[str, Any]) -> None:
    cp = values["model_name"] == "TensorCP"
    values["demo"] = values["nerf_dataset"] == "demo"
    if values["demo"]:
        values["nerf_scene"] = _demo_scene(values)
    elif values["multi_data"] or values["datasets"]:
        values["nerf_scene"] = None
    values["tag"] = values["tag"] or values["strategy"] + ("_cp" if cp else "")
    if values["downsample_test"] is None:
        values["downsample_test"] = values["downsample_train"]
    if values["ndc_ray"] is None:
        values["ndc_ray"] = int(values["nerf_dataset"] == "llff")
    if cp:
        values["n_lamb_sigma"], values["n_lamb_sh"] = values["n_lamb_sigma"][:1], values["n_lamb_sh"][:1]


# --- contradictions --------------------------------------------------------------------------------------------------
def _check(values: dict[str, Any], sources: dict[str, str]) -> None:
    """Raise OptionError at the first pair of options that cannot go together."""
    faults = _scene_faults(values, sources), _field_faults(values), _file_faults(values), _sweep_faults(values, sources)
    for name, remedy in chain(*faults):
        value = "" if values[name] is None else _cut(f" = {values[name]}".replace(", ", ","))
        raise OptionError(f"{sources[name]}: {name}{value}: {remedy}")


def _scene_faults(values: dict[str, Any], sources: dict[str, str]):
    """Yield (option, remedy) for what contradicts the data set."""
    dataset, scene = values["nerf_dataset"], values["nerf_scene"]
    if dataset == "demo":
        if scene not in (None, "shapes", _demo_scene(values)):
            yield "nerf_scene", "is no demo scene; delete it and size the demo's one scene with --demo_resolution"
    elif values["multi_data"] or values["datasets"]:
        if scene and sources["nerf_scene"] == COMMAND_LINE:
            several = "datasets" if values["datasets"] else "multi_data"
            yield "nerf_scene", f"{several} runs all scenes; give one of the two"
    elif not scene:
        example = EXAMPLE_SCENES[dataset]
        remedy = f"is missing; name it, for example --nerf_scene {example}, or give --multi_data for all of {dataset}"
        yield "nerf_scene", f"{remedy}, or --demo, which needs no data"
    if dataset != "demo" and sources["demo_resolution"] != "default":
        yield "demo_resolution", f"only the demo scene has it; delete it, or use downsample_train for {dataset}"
    if values["ndc_ray"] not in (None, int(dataset == "llff")):
        yield "ndc_ray", f"the scenes of {dataset} need {int(dataset == 'llff')} (only llff is NDC); delete it"
    box = values["scene_bbox"]
    if box is not None and (len(box) != 6 or any(low >= high for low, high in zip(box[:3], box[3:], strict=True))):
        yield "scene_bbox", "give six numbers, the smallest corner first, for example [-1,-1,-1,1,1,1]"


def _field_faults(values: dict[str, Any]):
    """Yield (option, remedy) for what the field or its schedule cannot be built from."""
    for name, example in (("n_lamb_sigma", "16,16,16"), ("n_lamb_sh", "48,48,48")):
        counts = values[name]
        if values["model_name"] == "TensorVMSplit" and len(counts) != 3:
            yield name, f"TensorVMSplit needs a number for each of its three modes, for example [{example}]"
        if values["model_name"] == "TensorCP" and (len(counts) not in (1, 3) or len(set(counts)) != 1):
            yield name, "TensorCP has one number for all three modes, for example [96]"
    width = {"SH": 27, "RGB": 3}.get(values["shadingMode"], values["data_dim_color"])
    if values["data_dim_color"] != width:
        yield "data_dim_color", f"shadingMode {values['shadingMode']} needs {width}; change one of the two"
    if values["N_voxel_final"] < values["N_voxel_init"]:
        yield "N_voxel_final", f"is below N_voxel_init = {values['N_voxel_init']}; a grid only grows, raise it"
    for name in ("upsamp_list", "update_AlphaMask_list"):
        if values[name] != sorted(set(values[name])):
            yield name, "iterations must increase; sort them and drop what is twice"
    anchors, sources = (values["es_beta_a"] > 0, "lamda_a"), (values["es_beta_a"] < 1, "lamda_s")
    if not values["use_mse"] and not any(drawn and values[weight] > 0 for drawn, weight in (anchors, sources)):
        yield "lamda_s", "with this lamda_a and es_beta_a leaves no loss; give what is drawn a weight"
    if values["step_ratio"] < 1e-3:
        yield "step_ratio", "makes more samples than can be stored; give 0.001 or more"
    if values["lr_decay_iters"] == 0:
        yield "lr_decay_iters", "give -1 (all of n_iters) or a positive number of steps"


def _file_faults(values: dict[str, Any]):
    """Yield (option, remedy) for files that are not there or would be shared by several runs."""
    if values["ckpt"] is not None and not is_regular(Path(values["ckpt"])):
        yield "ckpt", "there is no such file; checkpoints lie in the run's folder as ckpt_{iteration}.th"
    if values["lpips_weights"] is not None and not Path(values["lpips_weights"]).is_dir():
        yield "lpips_weights", "there is no such folder; give the one that holds the backbones' .pth files"
    exported = values["export_tensorf"]
    if exported is not None and (Path(exported).is_dir() or not Path(exported).absolute().parent.is_dir()):
        yield "export_tensorf", "is no file in a folder that exists; make the folder, or give another file"
    several = next((name for name in ("compare", "strategies", "datasets", "multi_data") if values[name]), None)
    several = several or ("seeds" if values["seeds"] > 1 else None)
    for name in ("ckpt", "export_tensorf"):
        if several and values[name] is not None:
            yield name, f"is one file, {several} makes several runs; give one of the two"
    asked = ("render_test", "render_train", "render_path", "export_mesh", "export_tensorf")
    if values["render_only"] and not any(values[name] for name in asked):
        yield "render_only", f"there is nothing to do; give one of {', '.join('--' + name for name in asked)}"


def _sweep_faults(values: dict[str, Any], sources: dict[str, str]):
    """Yield (option, remedy) for what several runs cannot share."""
    if values["datasets"] and sources["nerf_dataset"] == COMMAND_LINE:
        yield "nerf_dataset", "datasets names several ones; give one of the two"
    if values["gpus"] and values["device"] != "auto":
        yield "device", "gpus gives each run its device; give one of the two"
    if values["gpus"] and values["jobs"] > 1:
        yield "jobs", "with gpus there is one run at a time on each; give one of the two"
    if values["launcher"] == "ray":
        for name, given in (("gpus", values["gpus"]), ("jobs", values["jobs"] > 1)):
            if given:
                yield name, "a Ray cluster knows its machines and what they can take; give this or launcher = ray"
