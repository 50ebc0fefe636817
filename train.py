"""One run: build, step, grow, evaluate, checkpoint. The wiring; formulas and strategies live elsewhere."""

import math
import sys
import time
from argparse import Namespace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from components.cameras import cast_rays
from components.draw_counts import DrawCounts
from components.evaluation import Evaluation, evaluate, evenly_spaced
from components.grids import learning_rate_factor, resolution_for, training_samples, voxel_schedule
from components.metrics import mse_to_psnr
from components.perceptual import PerceptualMetrics, check_weights_folder, load_perceptual_metrics
from components.pixel_sets import PixelSet
from components.regularisers import L1Density, build_regularisers
from components.types import PixelBatch, Scene
from dataLoader import Inspection, inspect_scene, load_scene, scene_folder
from dataLoader.assemble import Volume
from models import FieldConfig, build_field, field_state
from models.files import CHECKPOINT_FORMAT, load_field
from models.fixed_steps import WINDOW, FixedStep, FixedSteps, obstacle
from models.growth import MASK_VOXEL_LIMIT, kept_pixels, shrink, update_alpha_mask, upsample
from models.kernels import threads
from models.optimizers import crop_adam, load_adam, make_adam
from models.outputs import evaluation_renderer, export, pictures, save_overview, save_views, score
from models.rehearsal import step_seconds
from models.room import room_faults
from opt import RUN_IDENTITY_EXEMPT, resolved_dict, schedule_notes
from samplers import build_sampler, check_strategy
from utils.checkpoint_parts import check_like
from utils.checkpoints import latest_checkpoint, load_latest, prune_checkpoints, save_checkpoint
from utils.console import say
from utils.curves import read_curves
from utils.device import choose_device, device_name
from utils.errors import CheckpointError, SceneError, UserError
from utils.logs import RunLog, checked_position
from utils.memory import MemoryMeter, keep_freed_memory, objects_set_aside, tensors_mb
from utils.run_folder import git_commit, prepare_run_folder, read_json, run_folder, write_json_atomic
from utils.run_lock import RunLock, run_lock
from utils.seeds import make_generator
from utils.shortage import is_shortage, naming_shortage
from utils.signals import Preempted, stop_if_asked, stop_requests
from utils.stages import StageTotals, stage_of
from utils.timing import PhaseTimer, eta_text

# Runs of fewer steps need no estimate of their time.
SHORTEST_ESTIMATED_RUN = 100
# The dearest step computes a colour for every live sample. Parts of its time that a step takes on average until the
# alpha mask exists, and from then on, the later grids' growth included (lego200 on a CPU); in NDC (fern8), where the
# mask leaves little out.
STEP_SHARES, NDC_STEP_SHARES = (0.4, 0.25), (0.55, 0.65)
# results.json's psnr_5view: as many evenly spaced test views as the reference reports.
REFERENCE_VIEWS = 5
# Options that say how much memory training takes.
LOWER_MEMORY = ("batch_size", "N_voxel_final")


def run(options: Namespace, stop_after: float = math.inf) -> dict:
    """Train, or only render, one scene with one strategy and seed; returns the contents of results.json.

    stop_after: seconds of training after which the run ends as if n_iters had been reached (for benchmarks).
    Raises UserError (one line for the user) if anything in the input is wrong, Preempted when a signal asked to stop:
    the run is saved then.
    """
    with stop_requests():
        return run_or_answer(options, stop_after, time.perf_counter())


def run_or_answer(options: Namespace, stop_after: float, started: float) -> dict:
    """The same, where signals only ask to stop; started: perf_counter when the run began."""
    check_strategy(options.strategy)
    device = choose_device(options.device)
    folder = run_folder(
        options.save_dir, options.up_folder_name, options.nerf_dataset, options.nerf_scene, options.tag, options.seed
    )
    if options.render_only:
        with naming_shortage(device, None, {"eval_chunk": options.eval_chunk}):
            return render_only(options, folder, device)
    results = finished_results(folder, options)
    if results is None:
        with run_lock(folder) as lock:
            # Another process may have finished it just before the lock was ours.
            results = finished_results(folder, options)
            if results is None:
                results = train_in(folder, lock, options, device, stop_after, started)
    return results


def finished_results(folder: Path, options: Namespace) -> dict | None:
    """The results of a run that is finished and not to be overwritten. Raises RunFolderError for other settings."""
    if options.overwrite or not (folder / "results.json").exists():
        return None
    # Before anything is loaded: a finished run answers at once, or refuses other settings.
    prepare_run_folder(folder, resolved_dict(options), set(RUN_IDENTITY_EXEMPT), overwrite=False)
    say(f"{folder}: this run is finished; --overwrite starts it afresh, --render_only 1 renders from it")
    return read_json(folder / "results.json")


def train_in(
    folder: Path, lock: RunLock, options: Namespace, device: torch.device, stop_after: float, started: float
) -> dict:
    """Train, or go on training, in a folder that is locked; see `run`."""
    found = preflight(options, folder, device)
    found.require_good()
    memory = MemoryMeter(device)
    lower = {name: getattr(options, name) for name in LOWER_MEMORY}
    if device.type == "cuda" and options.cuda_graphs != "0":
        lower["cuda_graphs"] = f"{options.cuda_graphs}; 0 needs less"
    with naming_shortage(device, memory, lower):
        perceptual = load_perceptual_metrics(options.lpips_weights, device)
        for line in perceptual.lines:
            say(line)
        if device.type == "cpu":
            keep_freed_memory()
        memory.start()
        scenes = {split: load_split(options, split, found) for split in ("train", "test")}
        stop_if_asked()
        trainer = Trainer(options, folder, device, scenes, perceptual, memory, lock)
        afresh = options.overwrite or latest_checkpoint(folder) is None
        if afresh:
            trainer.begin()
        stop_if_asked()
        # After all that can be wrong with the input: a fault leaves nothing behind, and removes no run.
        prepare_run_folder(folder, resolved_dict(options), set(RUN_IDENTITY_EXEMPT), options.overwrite)
        if not afresh:
            load_latest(folder, trainer.restore)
            prune_checkpoints(folder)  # which a kill after the last one may have prevented
            say(f"resuming {folder} at iteration {trainer.iteration}")
        trainer.open_log()
        try:
            with torch.autograd.set_detect_anomaly(options.debug), objects_set_aside():
                trainer.train(started, stop_after)
            return trainer.finish()
        finally:
            trainer.log.close()


def preflight(options: Namespace, folder: Path, device: torch.device) -> Inspection:
    """What can be known before step 0: all headers and poses of the scene, and whether weights, memory and disk are
    there. Decodes and writes nothing; all that is wrong is in the inspection's `problems`, what is odd in its notes.

    Raises SceneError or OptionError where there is no scene to look at.
    """
    found = inspect_scene(
        options.nerf_dataset,
        options.data_folder,
        options.nerf_scene,
        {split: getattr(options, f"downsample_{split}") for split in ("train", "test")},
        scene_bbox=options.scene_bbox,
        skip_missing_frames=options.skip_missing_frames,
    )
    if options.lpips_weights:
        found.problems.attempt("options", check_weights_folder, Path(options.lpips_weights))
    if found.plans:
        config = field_config(options, next(iter(found.plans.values())).volume)
        image_bytes = found.plans["train"].n_bytes if "train" in found.plans else 0
        test_pixels = found.plans["test"].n_pixels // options.test_every if "test" in found.plans else 0
        faults, notes = room_faults(options, config, image_bytes, test_pixels, folder, device)
        for line in faults:
            found.problems.add("options", line)
        for line in [*notes, *schedule_notes(options)]:
            found.problems.note(line)
    return found


def check_lines(options: Namespace, folder: Path) -> tuple[list[str], bool]:
    """(what `preflight` found, as lines for the user; whether it found problems), for --check_only.

    folder: where the run will lie.
    """
    demo = options.nerf_dataset == "demo" and not scene_folder("demo", options.data_folder, options.nerf_scene).is_dir()
    if demo:
        return ["is drawn when it is first used"], False
    try:
        found = preflight(options, folder, choose_device(options.device))
    except UserError as error:
        return [f"problem: {error}"], True
    notes = [f"note: {line}" for line in found.problems.notes]
    return [*map(str, found.plans.values()), *found.problems.lines(), *notes], bool(found.problems)


def load_split(options: Namespace, split: str, found: Inspection | None = None) -> Scene:
    """The training or test views of the options' scene, on the CPU; found: the scene, where it was looked at before."""
    if found is not None:
        return found.load(split)
    return load_scene(
        options.nerf_dataset,
        options.data_folder,
        options.nerf_scene,
        split,
        options.downsample_train if split == "train" else options.downsample_test,
        scene_bbox=options.scene_bbox,
        skip_missing_frames=options.skip_missing_frames,
    )


def field_config(options: Namespace, scene: Scene | Volume) -> FieldConfig:
    """What the options and the scene (its near, far and ndc) say about the field."""
    return FieldConfig(
        model_name=options.model_name,
        n_density=tuple(options.n_lamb_sigma),
        n_appearance=tuple(options.n_lamb_sh),
        n_features=options.data_dim_color,
        shading=options.shadingMode,
        pos_pe=options.pos_pe,
        view_pe=options.view_pe,
        fea_pe=options.fea_pe,
        hidden=options.featureC,
        density_activation=options.fea2denseAct,
        density_shift=options.density_shift,
        distance_scale=options.distance_scale,
        step_ratio=options.step_ratio,
        weight_threshold=options.rm_weight_mask_thre,
        alpha_threshold=options.alpha_mask_thre,
        near=scene.near,
        far=scene.far,
        ndc=scene.ndc,
        mlp_dtype=options.mlp_dtype,
    )


def render_only(options: Namespace, folder: Path, device: torch.device) -> dict:
    """Render and export from a checkpoint, beside it; returns the test views' metrics, if they were asked for."""
    path = Path(options.ckpt) if options.ckpt else latest_checkpoint(folder)
    if path is None:
        raise CheckpointError(f"--render_only: {folder} holds no checkpoint; train the run first or give --ckpt FILE")
    scene = load_split(options, "test")
    field, _ = load_field(path, device, field_config(options, scene))
    perceptual = load_perceptual_metrics(options.lpips_weights, device)
    for line in perceptual.lines:
        say(line)
    scenes = {"test": scene.cameras_to(device)}
    if options.render_train:
        scenes["train"] = load_split(options, "train").cameras_to(device)
    evaluation = score(options, field, scenes, perceptual, path.parent)
    export(options, field, scenes["test"], path.parent)
    return evaluation.results() if evaluation else {}


class Trainer:
    """The state of a run and the steps that advance it; everything in it is saved and restored."""

    def __init__(
        self,
        options: Namespace,
        folder: Path,
        device: torch.device,
        scenes: dict[str, Scene],
        perceptual: PerceptualMetrics,
        memory: MemoryMeter,
        lock: RunLock | None = None,
    ) -> None:
        self.options, self.folder, self.device = options, folder, device
        self.perceptual, self.memory, self.lock = perceptual, memory, lock
        # The test images stay where they are: training must not pay for them.
        self.scenes = {"train": scenes["train"].to(device), "test": scenes["test"].cameras_to(device)}
        self.scene = self.scenes["train"]
        self.config = field_config(options, self.scene)
        self.lr_factor = learning_rate_factor(options.lr_decay_target_ratio, options.lr_decay_iters, options.n_iters)
        self.voxels = voxel_schedule(options.N_voxel_init, options.N_voxel_final, len(options.upsamp_list))
        self.timer = PhaseTimer(device)
        self.generators = {
            "jitter": make_generator(options.seed, "jitter", device),
            "background": make_generator(options.seed, "background"),
        }
        self.iteration, self.last_iteration = 0, options.n_iters
        self.train_seconds = self.setup_seconds = self.sampler_seconds = 0.0
        self.stages = StageTotals()
        self.stage = ""
        # Of the steps since the last report: errors and losses, unread, and time before a resumption.
        self.losses: list[Tensor] = []
        self.reported_iteration, self.unreported_seconds = 0, 0.0
        # Whether the last report still lacks its evaluation; where the log was when the checkpoint was saved.
        self.owes_pictures = False
        self.log_position: dict[str, int] | None = None
        self.mask_grid: tuple[int, int, int] | None = None
        self.kept: Tensor | None = None
        self.draws = DrawCounts(self.scene)
        # What replays steps, see --cuda_graphs.
        self.fixed: FixedSteps | None = None

        o = options
        self.regularisers = build_regularisers(
            max(o.L1_weight_inital, o.L1_weight_rest), o.TV_weight_density, o.TV_weight_app, o.Ortho_weight
        )
        self.set_l1_weight(o.L1_weight_inital)

    # --- beginning and resuming ---

    def begin(self) -> None:
        """Build field (from --ckpt if given), optimiser and sampler afresh; writes nothing."""
        o = self.options
        if o.ckpt:
            self.field, _ = load_field(Path(o.ckpt), self.device, self.config)
            say(f"starting from the field in {o.ckpt}")
        else:
            grid = resolution_for(o.N_voxel_init, self.scene.aabb)
            self.field = build_field(self.config, self.scene.aabb, grid, o.seed)
        self.optimizer = make_adam(self.field.param_groups(o.lr_init, o.lr_basis))
        if o.filter_rays and not self.scene.ndc:
            self.filter_rays(by_mask=False)
        self.sampler = self.new_sampler()

    def filter_rays(self, by_mask: bool) -> None:
        """Keep the pixels whose rays meet the box, or the alpha mask, of those that were kept before."""
        self.kept = kept_pixels(self.field, self.scene, by_mask, self.kept)
        share = int(self.kept.sum()) / self.kept.numel()
        say(f"--filter_rays: the rays of {share:.1%} of the training pixels meet the {'mask' if by_mask else 'box'}")

    def new_sampler(self):
        """A sampler over the kept pixels, with a stream of its own for every set of them."""
        if self.kept is not None and not bool(self.kept.any()):
            raise SceneError(
                f"{self.scene.name}: no training ray meets the box or the alpha mask; check --scene_bbox and the "
                "poses, or train with --filter_rays 0"
            )
        pixels = PixelSet(self.scene.n_pixels, self.kept)
        generator = make_generator(self.options.seed, f"sampler/{pixels.count}", self.device)
        return build_sampler(self.options.strategy, self.scene, pixels, self.options, generator)

    def set_l1_weight(self, weight: float) -> None:
        for regulariser in self.regularisers:
            if isinstance(regulariser, L1Density):
                regulariser.weight = weight

    def state_dict(self) -> dict:
        """All that the rest of the run depends on; tensors and plain values."""
        return {
            "format": CHECKPOINT_FORMAT,
            "device": self.device.type,
            "iteration": self.iteration,
            "field": field_state(self.field),
            "optimizer": self.optimizer.state_dict(),
            "regularisers": {r.name: r.weight for r in self.regularisers},
            "mask_grid": None if self.mask_grid is None else list(self.mask_grid),
            "kept": None if self.kept is None else self.kept.cpu(),
            "sampler": self.sampler.state_dict(),
            "generators": {name: g.get_state() for name, g in self.generators.items()},
            "timer": self.timer.state_dict(),
            "memory": self.memory.state_dict(),
            "seconds": [self.train_seconds, self.setup_seconds],
            "stages": self.stages.state_dict(),
            "draws": self.draws.tensor.cpu(),
            "unreported": {
                "losses": torch.stack(self.losses).cpu() if self.losses else torch.empty(0, 2),
                "seconds": time.perf_counter() - self.reported_at if self.losses else 0.0,
                "sampler_seconds": self.sampler_seconds,
                "owes_pictures": self.owes_pictures,
            },
            "log": self.log.position(),
        }

    def expected_state(self) -> dict:
        """What `restore` reads itself, as far as its make is known beforehand; values do not matter."""
        return {
            "iteration": 0,
            "regularisers": {r.name: 0.0 for r in self.regularisers},
            "mask_grid": None if self.mask_grid is None else [0, 0, 0],
            "sampler": self.sampler.state_dict(),
            "generators": {name: g.get_state() for name, g in self.generators.items()},
            "timer": self.timer.state_dict(),
            "memory": self.memory.state_dict(),
            "seconds": [0.0, 0.0],
            "stages": self.stages.state_dict(),
            "draws": self.draws.tensor,
            "unreported": {"seconds": 0.0, "sampler_seconds": 0.0, "owes_pictures": False},
        }

    def restore(self, path: Path) -> None:
        """Continue where `state_dict` was taken. Raises CheckpointError if the file is damaged or another run's."""
        self.field, state = load_field(path, self.device, self.config)
        trained_on = str(state.get("device", self.device.type))
        if trained_on != self.device.type:
            raise CheckpointError(
                f"{path} was trained on {trained_on}, whose random streams {self.device.type} cannot continue: go on "
                f"with --device {trained_on}, or start from its field with --ckpt {path} --tag NEW"
            )
        try:
            self.optimizer = make_adam(self.field.param_groups(self.options.lr_init, self.options.lr_basis))
            load_adam(self.optimizer, state["optimizer"])
            for regulariser in self.regularisers:
                regulariser.weight = state["regularisers"][regulariser.name]
            self.mask_grid = None if state["mask_grid"] is None else tuple(state["mask_grid"])
            self.kept = None if state["kept"] is None else state["kept"].to(self.device)
            if self.kept is not None:
                check_like(torch.empty(self.scene.n_pixels, dtype=torch.bool), self.kept, "kept")
            self.sampler = self.new_sampler()
            check_like(self.expected_state(), state, "the run's state")
            if not 0 <= state["iteration"] <= self.options.n_iters:
                raise ValueError(f"iteration {state['iteration']} of {self.options.n_iters}")
            self.sampler.load_state_dict(state["sampler"])
            for name, generator in self.generators.items():
                generator.set_state(state["generators"][name])
            self.timer.load_state_dict(state["timer"])
            self.memory.load_state_dict(state["memory"])
            self.train_seconds, self.setup_seconds = state["seconds"]
            self.stages.load_state_dict(state["stages"])
            self.draws.tensor.copy_(state["draws"])
            unreported, self.log_position = state["unreported"], checked_position(state["log"])
            losses = unreported["losses"]
            if losses.shape[1:] != (2,) or len(losses) > state["iteration"] or not losses.is_floating_point():
                raise ValueError(f"losses of shape {list(losses.shape)}, {losses.dtype}")
            self.losses = list(losses.to(self.device))
            self.unreported_seconds = unreported["seconds"]
            self.sampler_seconds, self.owes_pictures = unreported["sampler_seconds"], unreported["owes_pictures"]
            self.iteration = state["iteration"]
            self.reported_iteration = self.iteration - len(self.losses)
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, IndexError, ArithmeticError) as error:
            if is_shortage(error):
                raise
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise CheckpointError(
                f"{path} does not fit this run ({reason}); remove it, or --overwrite the run"
            ) from error

    def open_log(self) -> None:
        """Start the log, or continue it where it was when the checkpoint was saved."""
        self.log = RunLog(self.folder, self.log_position, next_step=self.iteration + 1)

    def save(self) -> None:
        """Write a checkpoint; the last two are kept. Raises UserError if anything has become NaN or infinite, or the
        folder was lost to another process."""
        moments = [v for values in self.optimizer.state.values() for v in values.values() if isinstance(v, Tensor)]
        if not all(bool(tensor.isfinite().all()) for tensor in (*self.field.parameters(), *moments)):
            raise self.not_finite(f"the field became NaN or infinite before iteration {self.iteration}")
        if self.lock is not None:
            self.lock.check()
        save_checkpoint(self.state_dict(), self.folder / f"ckpt_{self.iteration}.th")
        prune_checkpoints(self.folder)

    # --- training ---

    def train(self, started: float, stop_after: float = math.inf) -> None:
        """Steps until n_iters, evaluations and checkpoints on the way.

        started: perf_counter when the run began. stop_after: seconds of training that are enough.
        """
        o = self.options
        if o.n_iters - self.iteration >= SHORTEST_ESTIMATED_RUN:
            say(self.estimate())
        now = time.perf_counter()
        self.setup_seconds += now - started
        self.reported_at = now - self.unreported_seconds
        self.fixed = self.fixed_steps()
        self.open_memory()
        # In a log file a bar is a line each time; a person wants it smooth.
        pause = 0.2 if sys.stderr.isatty() else 30.0
        try:
            if self.owes_pictures:
                self.visualise()
            with tqdm(initial=self.iteration, total=o.n_iters, unit="step", smoothing=0.05, mininterval=pause) as bar:
                while self.iteration < self.last_iteration:
                    with threads.taking_over():
                        n_steps = self.advance(self.steps_ahead())
                    if not n_steps:
                        stop_if_asked()
                        continue
                    self.grow()
                    self.iteration += 1
                    bar.update(n_steps)
                    if self.due(o.progress_refresh_rate, o.vis_every, o.save_every):
                        psnr, step_ms = self.report(stop_after)
                        bar.set_postfix(psnr=f"{psnr:.2f}", ms=f"{step_ms:.0f}", refresh=False)
                    stop_if_asked()
        except Preempted:
            if self.losses:
                self.read_losses()
            self.close_memory()
            self.save()
            say(f"checkpoint of iteration {self.iteration} saved")
            raise

    def due(self, *periods: int) -> bool:
        """Whether something with one of these periods happens now; everything does after the last step."""
        return self.iteration == self.last_iteration or any(self.iteration % period == 0 for period in periods)

    def background(self) -> float:
        """The step's background: the scene's, or black and white by turns (LLFF)."""
        if self.scene.random_background:
            return float(torch.rand((), generator=self.generators["background"]) < 0.5)
        return float(self.scene.white_background)

    def steps_ahead(self) -> int:
        """How many steps follow on each other before there is something else to do: growing, a report, the end."""
        o, now = self.options, self.iteration
        ends = [n + 1 for n in (*o.update_AlphaMask_list, *o.upsamp_list) if n >= now]
        ends += [(now // period + 1) * period for period in (o.progress_refresh_rate, o.vis_every, o.save_every)]
        return max(min(*ends, self.last_iteration) - now, 1)

    def advance(self, most: int = 1) -> int:
        """One step; with --cuda_graphs up to `most`, between which only a sampler may wait for the device. Their losses
        are kept.

        Returns how many were made, maybe fewer; the iteration is that of the last one. 0: it is as it was, call again.
        """
        fixed = self.fixed
        if fixed is None or not (fixed.step or fixed.ready):
            self.losses.append(self.step())
            if fixed is not None:
                fixed.see(*self.needs)
            return 1
        if fixed.step is None:
            self.record_step()
        return self.replay(min(most, WINDOW))

    def step(self) -> Tensor:
        """One optimiser step; [2], the plain mean squared error of the batch and its loss, not waited for."""
        o, phase = self.options, self.timer.phase
        self.stage = stage_of(self.iteration, o.update_AlphaMask_list, o.upsamp_list, o.n_iters)
        with phase("sampler"):
            pixels = self.sampler.sample(self.iteration)
            self.draws.add(pixels)
        with phase("forward"):
            rays = cast_rays(self.scene, pixels)
            n_samples = training_samples(self.field.grid_size, o.step_ratio, o.nSamples)
            jitter = self.field.draw_jitter(len(rays), n_samples, self.generators["jitter"])
            out = self.field.render(rays, self.background(), jitter, n_samples)
            error = out.rgb - self.scene.colors(pixels)
        with phase("sampler"):
            weight = self.sampler.weigh(pixels, error.detach(), self.iteration)
        with phase("forward"):
            ray_loss = weight * error.square().mean(-1)
            self.terms = {r.name: r(self.field, self.lr_factor) for r in self.regularisers if r.weight > 0}
            loss = ray_loss.mean() + sum(self.terms.values())
        with phase("backward"):
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            # Without the way back, which holds on to the stream that it was on.
            self.terms = {name: term.detach() for name, term in self.terms.items()}
        with phase("optimizer"):
            self.optimizer.step()
            for group in self.optimizer.param_groups:
                group["lr"] *= self.lr_factor
        with phase("sampler"):
            self.sampler.update(pixels, ray_loss.detach(), self.iteration)
        self.needs = (out.n_live, out.n_colour)
        self.stages.add(self.stage, steps=1, rays=len(rays), live_samples=out.n_live, colour_samples=out.n_colour)
        return torch.stack((error.detach().square().mean(), loss.detach()))

    # --- steps without waits ---

    def fixed_steps(self) -> FixedSteps | None:
        """What replays steps, if that is wanted and possible."""
        wanted = self.options.cuda_graphs
        if wanted == "0":
            return None
        why = obstacle(self.field)
        if why is not None and wanted == "1":
            say(f"--cuda_graphs: {why}; steps are made one by one")
        return FixedSteps() if why is None else None

    def record_step(self) -> None:
        """Make what replays steps, for the field and the sampler as they are."""
        o, moment = self.options, self.moment()
        pixels = self.sampler.sample(self.iteration)
        self.go_back(moment)
        n_samples = training_samples(self.field.grid_size, o.step_ratio, o.nSamples)
        self.close_memory()
        self.memory.unseen_mb = 0.0
        given = (self.field, self.scene, self.optimizer, self.regularisers)
        step = self.fixed.make(*given, pixels=pixels, n_samples=n_samples)
        self.memory.unseen_mb = step.replayed_mb
        self.open_memory()

    def forget_step(self) -> None:
        """Before the field or the sampler changes; a new stretch for the memory meter begins."""
        self.close_memory()
        if self.fixed is not None:
            self.fixed.forget()
        self.memory.unseen_mb = 0.0
        self.open_memory()

    def moment(self) -> dict:
        """What the host must set back to make a step again."""
        generators = {name: generator.get_state() for name, generator in self.generators.items()}
        rates = [group["lr"] for group in self.optimizer.param_groups]
        weights = [regulariser.weight for regulariser in self.regularisers]
        return {"sampler": self.sampler.state_dict(), "generators": generators, "rates": rates, "weights": weights}

    def go_back(self, moment: dict) -> None:
        """To a moment since which the optimiser has changed nothing."""
        self.sampler.load_state_dict(moment["sampler"])
        for name, generator in self.generators.items():
            generator.set_state(moment["generators"][name])
        for group, rate in zip(self.optimizer.param_groups, moment["rates"], strict=True):
            group["lr"] = rate
        for regulariser, weight in zip(self.regularisers, moment["weights"], strict=True):
            regulariser.weight = weight

    def replay(self, n_steps: int) -> int:
        """`advance` by replayed steps; only afterwards it is asked what they needed."""
        o, fixed, first, made = self.options, self.fixed, self.iteration, []
        step, varies = fixed.step, False
        self.stage = stage_of(first, o.update_AlphaMask_list, o.upsamp_list, o.n_iters)
        step.stopped.zero_()
        for self.iteration in range(first, first + n_steps):
            moment = self.moment()
            with self.timer.phase("sampler"):
                pixels = self.sampler.sample(self.iteration)
            if not step.fits(pixels):
                say(f"--cuda_graphs: steps of {len(step.pixels)} rays, then {len(pixels)}; steps are made one by one")
                self.go_back(moment)
                varies = True
                break
            made.append((moment, pixels, *self.replayed(step, pixels)))
        needs = torch.stack([needs for *_, needs in made]).tolist() if made else []
        had_room = fixed.judge(needs)
        for (_, pixels, losses, _), (n_live, n_colour) in zip(made[:had_room], needs, strict=False):
            self.draws.add(pixels)
            self.losses.append(losses)
            self.stages.add(self.stage, steps=1, rays=len(pixels), live_samples=n_live, colour_samples=n_colour)
        if had_room == len(made) > 0:
            self.terms = {name: term.clone() for name, term in step.terms.items()}
        if had_room < len(made):
            self.go_back(made[had_room][0])
        if varies:
            self.forget_step()
            self.fixed = None
        self.iteration = first + max(had_room, 1) - 1
        return had_room

    def replayed(self, step: FixedStep, pixels: PixelBatch) -> tuple[Tensor, Tensor]:
        """A replayed step: ([2] what `step` returns, [2] the live and the coloured samples that it needed)."""
        phase = self.timer.phase
        with phase("forward"):
            step.give(pixels, self.background(), self.generators["jitter"])
            step.show()
        with phase("sampler"):
            step.weight.copy_(self.sampler.weigh(step.pixels, step.error, self.iteration))
        with phase("backward"):
            for regulariser in step.regularisers:
                regulariser.advance(self.lr_factor)
            step.set_penalty_weights()
            step.learn()
        with phase("optimizer"):
            step.set_rates([group["lr"] for group in self.optimizer.param_groups])
            step.update()
            for group in self.optimizer.param_groups:
                group["lr"] *= self.lr_factor
        with phase("sampler"):
            self.sampler.update(step.pixels, step.ray_loss, self.iteration)
        return step.losses.clone(), step.needs.clone()

    def grow(self) -> None:
        """Alpha mask, shrinking, ray filtering, upsampling: what is due after this iteration's optimiser step."""
        o, iteration = self.options, self.iteration
        if iteration not in o.update_AlphaMask_list and iteration not in o.upsamp_list:
            return
        self.read_losses()  # what is not finite by now is better named than grown
        self.forget_step()  # growing counts in the peak, but not in what a step needs
        with self.timer.phase("grow"):
            if iteration in o.update_AlphaMask_list:
                self.update_mask(first=iteration == o.update_AlphaMask_list[0])
                if o.filter_rays and not self.scene.ndc and iteration in o.update_AlphaMask_list[1:2]:
                    self.filter_rays(by_mask=True)
                    self.sampler = self.new_sampler()
            if iteration in o.upsamp_list:
                voxels = self.voxels[o.upsamp_list.index(iteration)]
                upsample(self.field, resolution_for(voxels, self.field.aabb))
                scale = 1.0 if o.lr_upsample_reset else o.lr_decay_target_ratio ** (iteration / o.n_iters)
                self.optimizer = make_adam(self.field.param_groups(o.lr_init * scale, o.lr_basis * scale))
        self.memory.peak_mb()
        self.open_memory()

    def open_memory(self) -> None:
        """Begin a stretch of steps for the memory meter, with no gradient of the last step about."""
        self.optimizer.zero_grad(set_to_none=True)
        self.memory.begin_segment(self.static_mb())

    def close_memory(self) -> None:
        """End a stretch of steps for the memory meter."""
        step_mb = self.memory.close_segment(self.static_mb())
        if self.stage:  # not before the first step of a resumed run
            self.stages.memory(self.stage, step_mb)

    def update_mask(self, first: bool) -> None:
        """A new alpha mask; the first one also shrinks the field to it and changes the L1 weight."""
        if self.mask_grid is None or math.prod(self.field.grid_size) < MASK_VOXEL_LIMIT:
            self.mask_grid = self.field.grid_size
        box = update_alpha_mask(self.field, self.mask_grid)
        if not first:
            return
        before = dict(self.field.named_parameters())
        slices = shrink(self.field, box)
        after, groups = dict(self.field.named_parameters()), self.field.param_groups(0.0, 0.0)
        self.optimizer = crop_adam(self.optimizer, groups, before, after, slices)
        self.set_l1_weight(self.options.L1_weight_rest)

    def estimate(self) -> str:
        """How long the rest of the run may take: a few steps on a throw-away copy, which leave no trace."""
        o = self.options
        resumed = self.field.alpha_mask is not None
        generator = make_generator(o.seed, "estimate", self.device)
        step = step_seconds(self.field, self.scene, o.batch_size, o.step_ratio, o.nSamples, generator)
        left = o.n_iters - self.iteration
        n_first = max(min([o.n_iters, *o.update_AlphaMask_list[:1]]) - self.iteration, 0)
        shares = NDC_STEP_SHARES if self.config.ndc else STEP_SHARES
        first, later = (1.0, 1.0) if resumed else shares
        seconds = step * (first * n_first + later * (left - n_first))
        return (
            f"{left} steps on {device_name(self.device)}: about {eta_text(seconds)} of training, evaluations not "
            f"counted (a step takes up to {1000 * step:.0f} ms now, less where the alpha mask leaves space out, more "
            "as the grid grows)"
        )

    # --- reporting ---

    def report(self, stop_after: float) -> tuple[float, float]:
        """Log, save and show what is due after the steps since the last report: their PSNR, milliseconds a step."""
        mse, n_steps = self.read_losses(), len(self.losses)
        seconds = time.perf_counter() - self.reported_at
        step_ms = 1000.0 * seconds / n_steps
        self.train_seconds += seconds
        if self.train_seconds > stop_after:
            self.last_iteration = self.iteration
        self.stages.add(self.stage, seconds=seconds)
        self.log_steps(mse, step_ms, n_steps)
        self.losses.clear()
        self.reported_iteration = self.iteration
        self.owes_pictures = self.due(self.options.vis_every) and self.iteration < self.last_iteration
        # Before the evaluation: should that be cut short, it alone is to be made again.
        if self.due(self.options.save_every):
            self.close_memory()
            self.save()
            self.open_memory()
        if self.owes_pictures:
            self.visualise()
        self.reported_at = time.perf_counter()
        return mse_to_psnr(mse), step_ms

    def read_losses(self) -> float:
        """Mean of the unreported steps' errors, all read back at once. Raises UserError for the first one that is not
        finite, or whose loss is not."""
        read = torch.stack(self.losses).cpu()
        finite = read.isfinite().all(-1)
        if not finite.all():
            first = int(finite.int().argmin())
            value = next(x for x in read[first].tolist() if not math.isfinite(x))
            iteration = self.reported_iteration + first + 1
            raise self.not_finite(f"the loss became {value} at iteration {iteration}")
        if not self.stages.total("live_samples"):
            raise SceneError(
                f"{self.scene.name}: no ray of the first {self.reported_iteration + len(read)} iterations met the box "
                f"between near {self.scene.near:g} and far {self.scene.far:g}; check --scene_bbox and the poses, then "
                "start this run again with --overwrite"
            )
        return read[:, 0].mean().item()

    def not_finite(self, what: str) -> UserError:
        """The error for numbers that are no longer numbers; the checkpoints from before are never touched."""
        latest = latest_checkpoint(self.folder)
        kept = f"{latest.name} is from before it" if latest else "nothing was saved before"
        return UserError(f"{what} ({kept}): lower --lr_init or --lr_basis and start this run again with --overwrite")

    def log_steps(self, mse: float, step_ms: float, n_steps: int) -> None:
        """Scalars of the n_steps steps since the last call, to metrics.jsonl and TensorBoard."""
        self.timer.collect()
        before, self.sampler_seconds = self.sampler_seconds, self.timer.seconds["sampler"]
        sampler_ms = 1000.0 * (self.sampler_seconds - before) / n_steps
        values = {"train/PSNR": mse_to_psnr(mse), "train/mse": mse}
        values |= {f"train/{name}": term.item() for name, term in self.terms.items()}
        values |= {"memory/allocated_mb": self.memory.allocated_mb(), "memory/peak_mb": self.memory.peak_mb()}
        values |= {"time/step_ms": step_ms, "time/sampler_ms": sampler_ms, "time/train_seconds": self.train_seconds}
        self.log.scalars(self.iteration, values)

    def static_mb(self) -> float:
        """Memory that stays from step to step: pixels, parameters, optimiser, mask, the sampler's tables."""
        state = [v for values in self.optimizer.state.values() for v in values.values()]
        images = [scene.images for scene in self.scenes.values() if scene.device == self.device]
        tables = [v for v in vars(self.sampler).values() if isinstance(v, Tensor)]
        tensors = [*images, *self.field.parameters(), *self.field.buffers(), *tables, self.draws.tensor]
        return tensors_mb([*tensors, *state] + ([] if self.kept is None else [self.kept]))

    def visualise(self) -> None:
        """Evaluate N_vis test views, in between; pictures to imgs_vis and TensorBoard."""
        test = self.scenes["test"]
        views = evenly_spaced(test.n_images, self.options.N_vis)
        if not views:
            self.owes_pictures = False
            return
        self.close_memory()
        evaluation = evaluate(
            test,
            evaluation_renderer(self.field, test),
            views,
            self.perceptual,
            self.folder / "imgs_vis",
            self.options.eval_chunk,
            prefix=f"{self.iteration:06d}_",
        )
        self.log.scalars(self.iteration, {f"test/{k}": v for k, v in evaluation.means.items() if v is not None})
        self.show(evaluation)
        self.owes_pictures = False
        self.open_memory()

    def show(self, evaluation: Evaluation) -> None:
        """Pictures of an evaluation and of the draws, to TensorBoard; the first of them to overview.png too."""
        for tag, picture in pictures(evaluation, self.draws).items():
            self.log.image(self.iteration, tag, picture)
        save_overview(self.folder / "overview.png", evaluation)

    def finish(self) -> dict:
        """The final evaluation and outputs; writes results.json last, after which the run counts as finished."""
        self.close_memory()
        if self.fixed is not None:
            self.fixed.forget()  # its memory is the evaluation's
        test = self.scenes["test"]
        evaluation = score(self.options, self.field, self.scenes, self.perceptual, self.folder)
        views = range(0, test.n_images, self.options.test_every)
        few = [views[i] for i in evenly_spaced(len(views), REFERENCE_VIEWS)]
        scored = evaluation or evaluate(test, evaluation_renderer(self.field, test), few, self.perceptual)
        psnr = dict(zip(scored.indices, scored.psnr, strict=True))
        means = evaluation.means if evaluation else dict.fromkeys(Evaluation.METRICS)
        results = {**self.facts(), **means, "psnr_5view": sum(psnr[i] for i in few) / len(few)}
        names = [Path(test.image_paths[view]).name for view in scored.indices]
        results["per_view"] = {"names": names, **evaluation.results()["per_view"]} if evaluation else None
        results["lpips"] = self.perceptual.lines
        results |= self.curves(psnr)
        if evaluation:
            scalars = {"test/psnr_all": means["psnr"], **{f"test/{k}": v for k, v in means.items()}}
            self.log.scalars(self.iteration, {k: v for k, v in scalars.items() if v is not None})
        self.show(scored)
        save_views(self.folder / "views.npz", scored, self.draws)
        # An export that fails must not take the run along; one that is cut short is made again with the evaluation.
        failure = None
        try:
            export(self.options, self.field, test, self.folder)
        except Exception as error:
            failure = error
        if self.lock is not None:
            self.lock.check()
        write_json_atomic(self.folder / "results.json", results)
        say(
            f"{self.folder}: test PSNR {means['psnr'] or results['psnr_5view']:.2f} dB over {len(psnr)} of "
            f"{test.n_images} views, training took {eta_text(self.train_seconds)}, peak memory "
            f"{results['peak_memory_mb']:.0f} MB; see overview.png there"
        )
        if failure is not None:
            raise failure
        return results

    def curves(self, psnr: dict[int, float]) -> dict:
        """results.json's curves; psnr: the final figure of each scored view, from which the test curve's last comes."""
        curves, test = read_curves(self.folder / "metrics.jsonl")
        views = evenly_spaced(self.scenes["test"].n_images, self.options.N_vis)
        if views and all(view in psnr for view in views):
            test["iteration"].append(self.iteration)
            test["train_seconds"].append(self.train_seconds)
            test["psnr"].append(sum(psnr[view] for view in views) / len(views))
        return {"curves": curves, "test_curve": test}

    def facts(self) -> dict:
        """The part of results.json that is known without rendering."""
        o, total, steps = self.options, self.stages.total, max(self.iteration, 1)
        return {
            "dataset": o.nerf_dataset,
            "scene": o.nerf_scene,
            "strategy": o.strategy,
            "tag": o.tag,
            "seed": o.seed,
            "model_name": o.model_name,
            "n_iters": self.iteration,
            "batch_size": o.batch_size,
            "rays_per_step": total("rays") / steps,
            "live_samples_per_step": total("live_samples") / steps,
            "colour_samples_per_step": total("colour_samples") / steps,
            "stages": self.stages.results(),
            "train_seconds": self.train_seconds,
            "setup_seconds": self.setup_seconds,
            "ms_per_step": self.timer.ms_per_step(steps),
            "peak_memory_mb": self.memory.peak_mb(),
            "static_memory_mb": self.static_mb(),
            "step_memory_mb": self.memory.step_mb(),
            "device": device_name(self.device),
            "torch": torch.__version__,
            "commit": git_commit(),
            "kernels": self.field.kernels.name,
            "options": resolved_dict(o),
        }
