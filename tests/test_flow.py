"""Flow: known motions come back; the native solver agrees with a plain one and with OpenCV."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import flow_reference
import numpy as np
import pytest

from mmdist_e2e.extractors import flow
from mmdist_e2e.extractors.flow import tvl1
from mmdist_e2e.extractors.flow.settings import NATIVE_ITERATIONS, TVL1Settings, pyramid
from mmdist_e2e.structures import MmdistError

cv2 = pytest.importorskip("cv2")
SIDE = 96


def textured(seed: int, side: int = 2 * SIDE) -> np.ndarray:
    """A smooth random texture, larger than what the pair shows."""
    noise = np.random.default_rng(seed).uniform(0, 255, (side, side)).astype(np.float32)
    smooth = cv2.GaussianBlur(noise, (0, 0), 2.0)
    smooth -= smooth.min()
    return smooth / smooth.max() * 255


def moved_pair(seed: int, matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    texture = textured(seed)
    moved = cv2.warpAffine(texture, matrix, texture.shape[::-1], flags=cv2.INTER_CUBIC)
    crop = slice(SIDE // 2, SIDE // 2 + SIDE)
    return tuple(
        image[crop, crop].round().clip(0, 255).astype(np.uint8) for image in (texture, moved)
    )


def translation(shift: tuple[float, float]) -> np.ndarray:
    return np.array([[1, 0, shift[0]], [0, 1, shift[1]]], dtype=np.float32)


def error(flow: np.ndarray, truth: np.ndarray) -> float:
    """Mean end-point error away from the border, where pixels leave the picture."""
    inner = (slice(None), slice(12, -12), slice(12, -12))
    return float(np.hypot(*(flow[inner] - truth[inner])).mean())


@pytest.mark.parametrize("backend", ["native", "opencv"])
def test_known_translations_come_back(backend):
    rng = np.random.default_rng(0)
    shifts = [tuple(rng.uniform(-3, 3, 2)) for _ in range(6)]
    pairs = [moved_pair(seed, translation(shift)) for seed, shift in enumerate(shifts)]
    first, second = (np.stack(side) for side in zip(*pairs, strict=True))
    flow = tvl1(first, second, backend=backend)
    assert flow.shape == (6, 2, SIDE, SIDE)
    assert flow.dtype == np.float32
    for got, shift in zip(flow, shifts, strict=True):
        truth = np.broadcast_to(np.array(shift)[:, None, None], got.shape)
        assert error(got, truth) < 0.1, shift
    # Each pair is solved alone: a batch changes nothing.
    np.testing.assert_array_equal(tvl1(first[3:4], second[3:4], backend=backend)[0], flow[3])


@pytest.mark.parametrize("degrees", [-3.0, 2.0])
def test_known_rotations_come_back(degrees):
    matrix = cv2.getRotationMatrix2D((SIDE, SIDE), degrees, 1.0)
    first, second = moved_pair(7, matrix)
    y, x = np.mgrid[:SIDE, :SIDE] + SIDE // 2
    truth = np.einsum("ij,jhw->ihw", matrix, np.stack([x, y, np.ones_like(x)])) - np.stack([x, y])
    assert np.abs(truth).max() > 1
    assert error(tvl1(first[None], second[None])[0], truth) < 0.1


@pytest.mark.parametrize(("height", "width"), [(40, 31), (24, 32), (33, 65), (16, 16)])
def test_the_native_solver_is_the_plain_algorithm(height, width):
    texture, other = textured(3)[:height, :width], textured(4)[:height, :width]
    first = texture.astype(np.uint8)
    second = (0.8 * np.roll(texture, (1, -2), (0, 1)) + 0.2 * other).astype(np.uint8)
    # Where a pixel leaves the image the solution jumps; more scales amplify float32's rounding.
    settings = TVL1Settings(iterations=7, warps=3, scales=2, epsilon=0.0)
    sizes = pyramid(height, width, settings)
    expected = flow_reference.solve(first, second, sizes, settings)
    got = tvl1(first[None], second[None], settings=settings)[0]
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(got, expected, atol=2e-3)


def test_the_converged_solution_is_opencvs():
    first, second = (image[None] for image in moved_pair(1, translation((1.5, -0.7))))
    settings = TVL1Settings(epsilon=0.0)
    ours = tvl1(first, second, backend="native", settings=settings)
    theirs = tvl1(first, second, backend="opencv", settings=settings)
    # OpenCV's CPU class samples with another cubic and quantises where it samples to 1/32 pixel.
    assert error(ours[0], theirs[0]) < 0.06


def test_the_budget_stands_for_the_early_stop():
    first, second = (image[None] for image in moved_pair(2, translation((2.0, 0.0))))
    exact = TVL1Settings(iterations=NATIVE_ITERATIONS, epsilon=0.0)
    np.testing.assert_array_equal(tvl1(first, second), tvl1(first, second, settings=exact))
    barely = tvl1(first, second, settings=TVL1Settings(scales=1, warps=1, iterations=1))
    truth = np.broadcast_to(np.array([2.0, 0.0])[:, None, None], barely[0].shape)
    assert error(barely[0], truth) > 5 * error(tvl1(first, second)[0], truth)


def test_tensors_come_back_as_tensors():
    torch = pytest.importorskip("torch")
    arrays = [np.stack([image] * 2) for image in moved_pair(2, translation((2.0, 0.0)))]
    tensors = [torch.from_numpy(array) for array in arrays]
    for backend in ("native", "opencv"):
        flow = tvl1(*tensors, backend=backend)
        assert flow.dtype == torch.float32
        np.testing.assert_array_equal(flow.numpy(), tvl1(*arrays, backend=backend))
    for other in (arrays[1], tensors[1].float(), tensors[1][:1]):
        with pytest.raises(MmdistError, match="one device"):
            tvl1(tensors[0], other)


def test_still_and_flat_images_do_not_move():
    flat = np.full((2, 20, 40), 77, np.uint8)
    assert not tvl1(flat, flat).any()
    picture = textured(5)[None, :50, :70].astype(np.uint8)
    assert np.abs(tvl1(picture, picture)).max() < 1e-3


def test_the_pyramid_stops_at_sixteen_pixels():
    assert pyramid(256, 341, TVL1Settings()) == [
        (256, 341),
        (205, 273),
        (164, 218),
        (131, 174),
        (105, 139),
    ]
    assert pyramid(20, 30, TVL1Settings()) == [(20, 30), (16, 24)]


@pytest.mark.parametrize(
    ("first", "second", "backend", "words"),
    [
        (np.zeros((1, 32, 32), np.uint8), np.zeros((1, 32, 32), np.uint8), "magic", "auto, native"),
        (np.zeros((1, 32, 32), np.uint8), np.zeros((2, 32, 32), np.uint8), "auto", "one shape"),
        (np.zeros((1, 32, 32), np.float32), np.zeros((1, 32, 32), np.float32), "auto", "uint8"),
        (np.zeros((1, 8, 32), np.uint8), np.zeros((1, 8, 32), np.uint8), "auto", "16 pixels"),
    ],
)
def test_bad_input_is_one_sentence(first, second, backend, words):
    with pytest.raises(MmdistError, match=words):
        tvl1(first, second, backend=backend)


@pytest.mark.parametrize("bad", [{"tau": 0}, {"scale_step": 1.0}, {"epsilon": -1}, {"warps": 0}])
def test_bad_settings_are_one_sentence(bad):
    with pytest.raises(MmdistError, match="positive settings"):
        TVL1Settings(**bad)


def test_opencv_cuda_is_used_where_it_is_and_explained_where_not(monkeypatch):
    images = np.zeros((2, 32, 32), np.uint8)
    monkeypatch.setattr(cv2, "cuda", types.SimpleNamespace(), raising=False)
    with pytest.raises(MmdistError, match="built with CUDA"):
        tvl1(images, images, backend="opencv-cuda")
    asked = {}

    class Mat:
        def upload(self, image):
            self.image = image

        def download(self):
            return self.image

    class Solver:
        def calc(self, first, second, flow):
            out = Mat()
            out.upload(np.stack([first.image, second.image], axis=-1).astype(np.float32))
            return out

    def create(**settings):
        asked.update(settings)
        return Solver()

    cuda = types.SimpleNamespace(getCudaEnabledDeviceCount=lambda: 1, GpuMat=Mat)
    monkeypatch.setattr(cv2, "cuda", cuda)
    with pytest.raises(MmdistError, match="cudaoptflow"):
        tvl1(images, images, backend="opencv-cuda")
    cuda.OpticalFlowDual_TVL1_create = create
    flow = tvl1(images + 1, images + 2, backend="opencv-cuda")
    np.testing.assert_array_equal(flow[:, 0], 1)
    np.testing.assert_array_equal(flow[:, 1], 2)
    assert (asked["iterations"], asked["scaleStep"]) == (300, 0.8)


NO_CACHE_CHECK = """
import numpy as np
from mmdist_e2e.extractors.flow import cpu, tvl1
from numba.core import caching

def full(*_):
    raise OSError(28, "No space left on device")

if "{fault}" == "full disk":
    caching.IndexDataCacheFile.save = full
images = np.random.default_rng(0).integers(0, 256, (2, 2, 16, 20), dtype=np.uint8)
print(cpu.__file__, round(float(np.abs(tvl1(*images)).sum()), 3))
"""


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["read-only", "full disk", "damaged"])
def test_flow_needs_no_cache_of_numba(tmp_path: Path, fault: str):
    """No home and a read-only package, as in a container; a full disk; a damaged cache."""
    package = Path(flow.__file__).parents[2]
    shutil.copytree(package / "extractors" / "flow", tmp_path / "mmdist_e2e/extractors/flow")
    for name in ("__init__.py", "structures.py", "extractors/__init__.py"):
        shutil.copy(package / name, tmp_path / "mmdist_e2e" / name)
    cached = tmp_path / "mmdist_e2e" / "extractors" / "flow" / "__pycache__"
    if fault != "damaged":
        shutil.rmtree(cached, ignore_errors=True)
    if fault == "read-only":
        cached.touch()  # root may write everywhere, but not into a file

    def total() -> str:
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("NUMBA", "XDG"))}
        environment |= {"HOME": "/proc/nowhere", "PYTHONPATH": str(tmp_path)}
        run = subprocess.run(
            [sys.executable, "-B", "-c", NO_CACHE_CHECK.format(fault=fault)],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert run.stdout.startswith(str(cached.parent)), run.stderr
        return run.stdout.split()[1]

    images = np.random.default_rng(0).integers(0, 256, (2, 2, 16, 20), dtype=np.uint8)
    expected = str(round(float(np.abs(tvl1(*images)).sum()), 3))
    assert total() == expected
    if fault == "damaged":
        indices = list(cached.glob("cpu.*.nbi"))
        assert indices
        for index in indices:
            index.write_bytes(b"")
        assert total() == expected


GPU_CHECK = """
import sys
import numpy as np
import torch
from mmdist_e2e.extractors.flow import gpu, tvl1
from mmdist_e2e.extractors.flow.settings import TVL1Settings, pyramid

gpu.MINIMUM_ROWS = 32
device = sys.argv[1]
rng = np.random.default_rng(0)
coarse = rng.uniform(0, 255, (1, 8, 13))
first = np.kron(coarse, np.ones((4, 6))).astype(np.uint8)[..., :77]
second = np.roll(first, (1, -1), (1, 2))
tensors = [torch.from_numpy(images).to(device) for images in (first, second)]

def difference(scales):
    settings = TVL1Settings(iterations=5, warps=scales, scales=scales, epsilon=0.0)
    sizes = pyramid(*first.shape[1:], settings)
    got = gpu.solve(*tensors, sizes, settings).cpu().numpy()
    expected = tvl1(first, second, settings=settings)
    assert np.abs(expected).max() > 0.3
    return got, np.abs(got - expected)

got, one_scale = difference(1)
assert one_scale.max() < 1e-3, one_scale.max()  # dual variables and gradients are halves
_, two_scales = difference(2)
# The solution jumps where a pixel leaves the image, so rounding is amplified there.
assert two_scales.mean() < 5e-4 and np.quantile(two_scales, 0.98) < 3e-3, two_scales.mean()
gpu.MINIMUM_ROWS = 18  # segments of a strip do not show in the result
again, _ = difference(1)
assert (again == got).all()
print("agrees")
"""


def gpu_check(device: str, **environment: str) -> None:
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", GPU_CHECK, device],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.stdout.strip() == "agrees", run.stderr


@pytest.mark.slow
def test_the_triton_kernels_agree_under_the_interpreter():
    pytest.importorskip("triton", reason="Triton is not installed (it comes with torch on Linux)")
    gpu_check("cpu", TRITON_INTERPRET="1")


@pytest.mark.cuda
def test_the_triton_kernels_agree_on_a_gpu():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    gpu_check("cuda")


@pytest.mark.slow
def test_the_triton_kernels_compile_for_a_gpu_that_is_not_here(tmp_path: Path, monkeypatch):
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from mmdist_e2e.extractors.flow import gpu

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    numbers = dict.fromkeys(("height", "width", "stride8", "strips", "rows"), "i32")
    numbers |= dict.fromkeys(("step", "bound", "prox", "dual_step"), "fp32")
    numbers |= dict.fromkeys(("dual", "dual_out", "gradient"), "*i32")
    for kernel, constants, warps in (
        (gpu._warp_kernel, {"BLOCK": gpu.WARP_BLOCK}, 4),
        (gpu._iterate_kernel, {"ITERATIONS": gpu.ITERATIONS_A_LAUNCH, "MARGIN": 4}, 1),
    ):
        types_ = {
            name: {**numbers, **dict.fromkeys(constants, "constexpr")}.get(name, "*fp32")
            for name in kernel.arg_names
        }
        places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
        aligned = {
            (place,): [["tt.divisibility", 16]]  # as torch allocates
            for place, name in enumerate(kernel.arg_names)
            if types_[name].startswith("*")
        }
        compiled = triton.compile(
            ASTSource(kernel, types_, places, aligned),
            target=GPUTarget("cuda", 90, 32),
            options={"num_warps": warps},
        )
        assert compiled.asm["cubin"]
        assert compiled.metadata.shared == 0
        assert "bar.sync" not in compiled.asm["ptx"]
        # The neighbours of a pair of columns: p11 and p21 on the left, u and v on the right.
        shuffles = compiled.asm["ptx"].count("shfl.sync")
        assert shuffles == (4 * gpu.ITERATIONS_A_LAUNCH if kernel is gpu._iterate_kernel else 0)


def test_the_triton_kernels_are_compiled_once_for_all_resolutions(monkeypatch):
    pytest.importorskip("triton", reason="Triton is not installed")
    torch = pytest.importorskip("torch")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    from mmdist_e2e.extractors.flow import gpu

    backend = make_backend(GPUTarget("cuda", 90, 32))
    variants: dict[str, set[str]] = {"_warp_kernel": set(), "_iterate_kernel": set()}

    def recorded(kernel):
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)

        class Launcher:
            def __getitem__(self, grid):
                assert all(0 < n < 2**31 for n in grid)
                return lambda *args, **named: variants[kernel.__name__].add(
                    str(bind(*args, **named)[1:])
                )

        return Launcher()

    for name in variants:
        monkeypatch.setattr(gpu, name, recorded(getattr(gpu, name)))
    settings = TVL1Settings(iterations=10, epsilon=0.0)
    for count, height, width in ((1, 16, 17), (2, 64, 96), (1, 128, 171), (3, 50, 256)):
        images = torch.zeros((count, height, width), dtype=torch.uint8)
        gpu.solve(images, images, pyramid(height, width, settings), settings)
    # Launches of four iterations, and of the last two.
    assert {name: len(found) for name, found in variants.items()} == {
        "_warp_kernel": 1,
        "_iterate_kernel": 2,
    }
