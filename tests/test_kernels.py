"""Every backend against torch_lookups, the definition: values, gradients, borders, chunks, threads, determinism."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from components.marching import Samples
from models.kernels import compiled, compiled_lookups, gather_lookups, select, threads, torch_lookups, torch_rendering
from models.kernels.torch_lookups import LINE_AXES, PLANE_AXES

DTYPES = [torch.float32, torch.float64]
# float32: of an array's largest magnitude. float64: rounding alone, a million times finer.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


class Case:
    """Random factors, basis and points of one decomposition; `outputs` runs density and appearance of a backend."""

    def __init__(self, model, seed, n_points, grid, counts, dtype=torch.float32, channels_last=True):
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape):
            values = torch.randn(*shape, generator=generator, dtype=dtype)
            if len(shape) == 4 and channels_last:
                values = values.contiguous(memory_format=torch.channels_last)
            return values.requires_grad_()

        counts = counts if model == "VM" else (counts[0],) * 3
        self.planes = []
        if model == "VM":
            axes = zip(counts, PLANE_AXES, strict=True)
            self.planes = [normal(1, c, grid[v], grid[u]) for c, (u, v) in axes]
        self.lines = [normal(1, c, grid[w], 1) for c, w in zip(counts, LINE_AXES, strict=True)]
        self.basis = normal(7, sum(counts) if model == "VM" else counts[0])
        self.xyz = points(generator, n_points, grid, dtype)
        self.upstream = torch.randn(n_points, 8, generator=generator, dtype=dtype)
        self.leaves = [*self.planes, *self.lines, self.basis]

    def outputs(self, backend):
        """(density [K], appearance [K, 7])."""
        if self.planes:
            density = backend.vm_density(self.planes, self.lines, self.xyz)
            return density, backend.vm_appearance(self.planes, self.lines, self.basis, self.xyz)
        return backend.cp_density(self.lines, self.xyz), backend.cp_appearance(self.lines, self.basis, self.xyz)

    def gradients(self, backend):
        """Gradients of all factors and the basis for `upstream`."""
        density, appearance = self.outputs(backend)
        loss = (density * self.upstream[:, 0]).sum() + (appearance * self.upstream[:, 1:]).sum()
        return torch.autograd.grad(loss, self.leaves)


def points(generator, n, grid, dtype):
    """Normalised points: a fifth each on grid points, on the border, up to two cells outside, far away; else inside."""
    xyz = torch.rand(n, 3, generator=generator, dtype=dtype) * 2 - 1
    size = torch.tensor(grid, dtype=dtype)
    on_grid = torch.floor(torch.rand(n, 3, generator=generator, dtype=dtype) * size) / (size - 1) * 2 - 1
    border = torch.sign(torch.randn(n, 3, generator=generator, dtype=dtype))
    beyond = border * (1 + 4 * torch.rand(n, 3, generator=generator, dtype=dtype) / (size - 1))
    kind = torch.randint(0, 5, (n,), generator=generator)
    axis = torch.randint(0, 3, (n,), generator=generator)
    rows = torch.arange(n)
    for number, special in enumerate((on_grid, border, beyond, border * 1e6)):
        chosen = kind == number
        xyz[rows[chosen], axis[chosen]] = special[rows[chosen], axis[chosen]]
    xyz[kind == 0] = on_grid[kind == 0]
    return xyz


def assert_equal_up_to_rounding(ours, definition, dtype):
    for actual, expected in zip(ours, definition, strict=True):
        assert actual.shape == expected.shape
        assert actual.dtype == expected.dtype
        if actual.numel():
            scale = expected.abs().max().clamp_min(1e-30)
            assert ((actual - expected).abs().max() / scale) < TOLERANCE[dtype]


def assert_refuses_second_gradients(case, backend):
    """Their first gradients are computed outside autograd: a second derivative would silently lack terms."""
    for values in case.outputs(backend):
        (gradient,) = torch.autograd.grad(values.square().sum(), case.lines[0], create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.square().sum().backward()


@pytest.fixture(params=["gather", "compiled"])
def backend(request):
    if request.param == "compiled" and compiled.libraries() is None:
        pytest.skip("no compiler here")
    return {"gather": gather_lookups, "compiled": compiled_lookups}[request.param]


def check(case, dtype, backend):
    with torch.no_grad():
        ours, definition = case.outputs(backend), case.outputs(torch_lookups)
    assert_equal_up_to_rounding(ours, definition, dtype)
    assert_equal_up_to_rounding(case.gradients(backend), case.gradients(torch_lookups), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("model", ["VM", "CP"])
@pytest.mark.parametrize("seed", range(8))
def test_values_and_gradients_equal_the_definition_for_random_shapes(model, seed, dtype, backend):
    rng = random.Random(seed)
    grid = tuple(rng.choice([2, 3, rng.randint(2, 100)]) for _ in range(3))
    counts = tuple(rng.choice([1, 2, rng.randint(1, 96)]) for _ in range(3))
    check(Case(model, seed, rng.randint(2, 1500), grid, counts, dtype), dtype, backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("model", ["VM", "CP"])
def test_values_and_gradients_equal_the_definition_on_large_grids(model, dtype, backend):
    check(Case(model, 11, 800, (400, 211, 37), (96, 3, 16), dtype), dtype, backend)


@pytest.mark.parametrize("counts", [(16, 48, 17), (48, 16, 16)], ids=str)
@pytest.mark.parametrize("model", ["VM", "CP"])
def test_values_and_gradients_equal_the_definition_for_the_usual_numbers_of_channels(model, counts, backend):
    check(Case(model, 5, 1300, (31, 9, 20), counts, torch.float32), torch.float32, backend)


@pytest.mark.parametrize("model", ["VM", "CP"])
@pytest.mark.parametrize("n_points", [0, 1])
def test_none_or_one_point_is_enough(model, n_points, backend):
    check(Case(model, 3, n_points, (5, 6, 7), (2, 3, 4)), torch.float32, backend)


@pytest.mark.parametrize("model", ["VM", "CP"])
def test_no_points_give_zero_gradients(model, backend):
    for gradient in Case(model, 3, 0, (5, 6, 7), (2, 3, 4)).gradients(backend):
        assert not gradient.any()


@pytest.mark.parametrize("model", ["VM", "CP"])
@pytest.mark.parametrize("channels_last", [True, False])
def test_the_memory_layout_of_the_factors_does_not_matter(model, channels_last, backend):
    case = Case(model, 5, 700, (9, 14, 6), (5, 8, 3), torch.float64, channels_last)
    assert all(line.is_contiguous(memory_format=torch.channels_last) for line in case.lines) or not channels_last
    check(case, torch.float64, backend)


@pytest.mark.parametrize("model", ["VM", "CP"])
@pytest.mark.parametrize("size", [1, 7, 64, 299, 300, 301])
def test_chunk_borders_change_nothing(model, size, monkeypatch):
    case = Case(model, 6, 300, (9, 14, 6), (5, 8, 3), torch.float64)
    whole, whole_gradients = case.outputs(gather_lookups), case.gradients(gather_lookups)
    monkeypatch.setattr(gather_lookups, "_chunk", lambda tables: size)
    assert_equal_up_to_rounding(case.outputs(gather_lookups), whole, torch.float64)
    assert_equal_up_to_rounding(case.gradients(gather_lookups), whole_gradients, torch.float64)


def test_many_points_take_several_chunks_of_the_size_that_fits_the_cache(monkeypatch):
    seen = []
    lookups = gather_lookups._lookups

    def spy(chunk, *rest):
        seen.append(len(chunk))
        return lookups(chunk, *rest)

    monkeypatch.setattr(gather_lookups, "_lookups", spy)
    monkeypatch.setattr(gather_lookups, "_CHUNK_VALUES", {"cpu": 14_000})
    case = Case("VM", 7, 2500, (9, 14, 6), (2, 3, 5))
    # Tables of 2 * (2 + 3 + 5) components: 28000 / 20 = 1400 points at once.
    case.outputs(gather_lookups)
    assert seen == [1400, 1100] * 2
    monkeypatch.setattr(gather_lookups, "_CHUNK_VALUES", {"cpu": 1})
    seen.clear()
    case.outputs(gather_lookups)
    assert seen == [1024, 1024, 452] * 2


@pytest.mark.parametrize("model", ["VM", "CP"])
def test_points_that_require_a_gradient_get_the_definitions(model, backend):
    case = Case(model, 8, 60, (9, 14, 6), (2, 3, 4), torch.float64)
    case.xyz.requires_grad_()
    leaves, case.leaves = case.leaves, [case.xyz, *case.leaves]
    ours, definition = case.gradients(backend), case.gradients(torch_lookups)
    assert ours[0].abs().max() > 0
    assert len(ours) == len(leaves) + 1
    assert_equal_up_to_rounding(ours, definition, torch.float64)


@pytest.mark.parametrize("model", ["VM", "CP"])
def test_gradients_of_points_and_factors_match_finite_differences(model):
    case = Case(model, 9, 6, (3, 4, 5), (2, 1, 2), torch.float64)
    # Inside cells: at their borders a bilinear function has a kink and no derivative.
    size = torch.tensor((3.0, 4.0, 5.0), dtype=torch.float64)
    inside = torch.rand(6, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 0.8 + 0.1
    cell = torch.floor(torch.rand(6, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * (size - 1))
    xyz = (cell + inside) / (size - 1) * 2 - 1

    def run(xyz, *leaves):
        case.xyz, case.basis = xyz, leaves[-1]
        case.planes, case.lines = list(leaves[:-4]), list(leaves[-4:-1])
        return case.outputs(gather_lookups)

    leaves = tuple(case.leaves)
    assert torch.autograd.gradcheck(run, (xyz.clone().requires_grad_(), *leaves))
    assert torch.autograd.gradcheck(run, (xyz, *leaves))


@pytest.mark.parametrize("model", ["VM", "CP"])
def test_gradients_of_gradients_are_refused(model, backend):
    assert_refuses_second_gradients(Case(model, 3, 40, (5, 6, 7), (2, 3, 4)), backend)


@pytest.mark.parametrize("model", ["VM", "CP"])
def test_the_same_input_gives_bit_equal_values_and_gradients_on_the_cpu(model, backend):
    # Few grid points and many samples: each row of a gradient sums hundreds of terms, in an order that must not vary.
    first, second = (Case(model, 10, 20_000, (5, 4, 6), (8, 16, 3)) for _ in range(2))
    for a, b in zip(first.outputs(backend), second.outputs(backend), strict=True):
        assert torch.equal(a, b)
    expected = first.gradients(backend)
    for case in (first, second):
        for a, b in zip(expected, case.gradients(backend), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("model", ["VM", "CP"])
def test_values_fade_over_one_cell_beyond_the_border_and_are_zero_from_there(model, backend):
    case = Case(model, 12, 1, (5, 5, 5), (3, 3, 3), torch.float64)
    cell = 2 / 4
    case.xyz = torch.tensor([[0.1, 0.2, 1.0 + part * cell] for part in (0.0, 0.25, 1.0, 1.5)], dtype=torch.float64)
    # In each mode (VM) and component (CP) one factor alone depends on z, so all values fade linearly.
    for values in case.outputs(backend):
        assert values[0].abs().max() > 0
        torch.testing.assert_close(values[1], 0.75 * values[0])
        assert not values[2:].any()


def test_both_backends_offer_the_same_functions_and_the_choice_is_named():
    names = {"vm_density", "vm_appearance", "cp_density", "cp_appearance"}
    assert all(hasattr(backend, name) for backend in (gather_lookups, torch_lookups) for name in names)
    chosen = select(torch.device("cpu"))
    assert chosen.name
    assert all(hasattr(chosen.lookups, function) for function in names)


# --- compiled ---
@pytest.fixture
def compiled_only(backend):
    if backend is not compiled_lookups:
        pytest.skip("about the compiled backend")
    return backend


@pytest.mark.parametrize("model", ["VM", "CP"])
def test_compiled_gradients_of_points_equal_the_definition_in_single_precision(compiled_only, model):
    case = Case(model, 8, 3000, (9, 14, 6), (2, 17, 40))
    case.xyz.requires_grad_()
    case.leaves = [case.xyz, *case.leaves]
    assert_equal_up_to_rounding(case.gradients(compiled_lookups), case.gradients(torch_lookups), torch.float32)


@pytest.mark.parametrize("n_threads", [2, 3, 7])
@pytest.mark.parametrize("model", ["VM", "CP"])
def test_results_of_several_threads_equal_those_of_one_and_each_other_to_the_bit(
    compiled_only, model, n_threads, monkeypatch
):
    case = Case(model, 13, 9000, (9, 14, 6), (16, 48, 3))
    case.xyz.requires_grad_()
    case.leaves = [case.xyz, *case.leaves]
    one = [*case.outputs(compiled_lookups), *case.gradients(compiled_lookups)]
    monkeypatch.setattr(threads, "_taken", n_threads)
    several = [[*case.outputs(compiled_lookups), *case.gradients(compiled_lookups)] for _ in range(3)]
    for repeated in several[1:]:
        assert all(torch.equal(a, b) for a, b in zip(several[0], repeated, strict=True))
    assert_equal_up_to_rounding(several[0], one, torch.float32)


@pytest.mark.parametrize("model", ["VM", "CP"])
@pytest.mark.parametrize("seed", range(6))
def test_weights_until_opaque_equal_the_definitions_for_random_shapes(compiled_only, model, seed):
    rng = random.Random(seed)
    grid = tuple(rng.choice([2, 3, rng.randint(2, 400)]) for _ in range(3))
    counts = tuple(rng.choice([1, 2, rng.randint(1, 96)]) for _ in range(3))
    lengths = torch.tensor([rng.choice([0, 1, rng.randint(2, 60)]) for _ in range(40)])
    case = Case(model, seed, int(lengths.sum()), grid, counts)
    ray, offsets = torch.repeat_interleave(lengths), torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    delta = torch.rand(len(ray), generator=torch.Generator().manual_seed(seed))
    samples = Samples(ray, delta, delta, case.xyz, offsets)
    with torch.no_grad():
        feature = case.outputs(torch_lookups)[0]
        # Distances of which some rays become opaque and others do not.
        activation = ("softplus", -1.0, 1.0 / feature.abs().max().clamp_min(1.0).item())
        ours = compiled_lookups.weights_until_opaque(case.planes, case.lines, samples, *activation)
        definition = torch_rendering.ray_weights(feature, samples, *activation)
    assert_equal_up_to_rounding([ours], [definition], torch.float32)


@pytest.mark.parametrize("n_threads", [1, 2, 7])
@pytest.mark.parametrize("crowded", [0.9, 1.0])
def test_points_of_many_slices_that_crowd_in_one_row_are_shared_out_right(
    compiled_only, n_threads, crowded, monkeypatch
):
    """More bands than rows that hold points, bands without any, points on borders of bands and of slices."""
    monkeypatch.setattr(threads, "_taken", n_threads)
    case = Case("VM", 21, 20_011, (5, 40, 33), (3, 4, 1))
    chosen = torch.rand(len(case.xyz), generator=torch.Generator().manual_seed(0)) < crowded
    case.xyz[chosen, 1:] = torch.tensor([0.31, -0.42])
    # As nothing flows to a point with a weight of zero.
    case.upstream[::3] = 0
    check(case, torch.float32, compiled_lookups)


@pytest.mark.parametrize("model", ["VM", "CP"])
def test_more_points_than_single_precision_can_number_are_looked_up(compiled_only, model, monkeypatch):
    monkeypatch.setattr(compiled_lookups, "_CHUNK", 1 << 14)  # fewer calls than for the cache
    monkeypatch.setattr(compiled_lookups, "_BLOCK", 1 << 18)
    n_points, generator = 2**24 + 600, torch.Generator().manual_seed(0)
    xyz = torch.rand(n_points, 3, generator=generator).mul_(2.2).sub_(1.1)
    # Some points, and the last ones, whose numbers float32 cannot tell apart; gradients flow to these alone.
    some = torch.cat([torch.arange(0, 2**24, 50_000), torch.arange(2**24 - 3, n_points)])
    upstream, results = torch.randn(len(some), generator=generator), []
    for backend, points, chosen in ((compiled_lookups, xyz, some), (torch_lookups, xyz[some], slice(None))):
        case = Case(model, 6, 1, (4, 3, 5), (1, 2, 1))
        case.xyz, case.basis = points, case.basis[:1].detach().requires_grad_()
        case.leaves[-1] = case.basis
        density, appearance = (values.view(-1)[chosen] for values in case.outputs(backend))
        loss = (density * upstream).sum() + (appearance * upstream.flip(0)).sum()
        results.append([density, appearance, *torch.autograd.grad(loss, case.leaves)])
    assert_equal_up_to_rounding(*results, torch.float32)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_points_that_are_no_numbers_reach_no_memory_outside_the_factors(compiled_only, value):
    case = Case("VM", 14, 50, (9, 14, 6), (5, 8, 3))
    case.xyz[7, 1] = value
    density, _ = case.outputs(compiled_lookups)
    others = torch.arange(50) != 7
    assert density[others].isfinite().all()
    assert all(gradient.isfinite().all() for gradient in case.gradients(compiled_lookups)[:6]) or value != value


def test_without_a_compiler_torchs_lookups_serve_and_one_line_says_so(monkeypatch, capsys):
    compiled.libraries.cache_clear()
    monkeypatch.setattr(compiled, "COMPILERS", ("no-such-compiler",))
    assert select(torch.device("cpu")).lookups is gather_lookups
    assert select(torch.device("cpu")).name == "torch-gather"
    out = capsys.readouterr().out
    assert out.count("no-such-compiler") == 1
    assert out.endswith("7 to 25 times slower; install g++ or clang++\n")
    compiled.libraries.cache_clear()


def test_without_a_cache_that_can_be_written_one_folder_serves_a_process_and_goes_with_it(tmp_path):
    (tmp_path / "cache").write_text("a file in its place")
    (tmp_path / "temporary").mkdir()
    places = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "TMPDIR": str(tmp_path / "temporary")}
    code = "from models.kernels.compiled import _cache_folder as f; (f() / 'a.so').touch(); print(f(), *f().iterdir())"
    command, root = [sys.executable, "-c", code], Path(compiled.__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=os.environ | places, capture_output=True, text=True, check=True)
    told, found = done.stdout.splitlines()
    assert "cache/expansive-supervision cannot be written" in told
    assert "XDG_CACHE_HOME" in told
    folder, library = map(Path, found.split())
    assert (folder.parent, library) == (tmp_path / "temporary", folder / "a.so")
    assert not list((tmp_path / "temporary").iterdir())


def test_a_failing_compiler_is_reported_and_leaves_nothing_behind(monkeypatch, capsys, tmp_path):
    compiled.libraries.cache_clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(compiled, "FLAGS", ("--no-such-flag",))
    assert compiled.libraries() is None
    assert "no-such-flag" in capsys.readouterr().out
    assert not list((tmp_path / "expansive-supervision").iterdir())
    compiled.libraries.cache_clear()
