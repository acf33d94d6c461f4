"""Runs the Triton kernels without a GPU: the interpreter has to be chosen before triton is first imported."""

import gc
import os
import sys
from importlib.util import find_spec

import pytest
import torch
from hypothesis import HealthCheck, settings

HAVE_GPU = torch.cuda.is_available()

if not HAVE_GPU:
    # Later than this, half of triton.language is compiled code already and kernels fail with "0 active drivers".
    assert "triton" not in sys.modules, "triton was imported before TRITON_INTERPRET could be set"
    os.environ["TRITON_INTERPRET"] = "1"

# The tests name their backend; a variable left over in the shell must not choose another one behind their back.
os.environ.pop("DAAM_KERNELS_BACKEND", None)
os.environ["DAAM_KERNELS_TUNED"] = "0"  # nor a tile that somebody tuned

# An interpreted kernel takes seconds where it would take microseconds, so no example has a deadline.
settings.register_profile("dev", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", parent=settings.get_profile("dev"), derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "dev")


def pytest_configure(config):
    # numpy speaks up where a GPU quietly gives inf, in lanes that are masked out later.
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton.runtime.interpreter")


def pytest_collection_finish(session):
    """Keeps torch and thousands of collected tests out of the collector's searches, which fuse() takes part in."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not HAVE_GPU:
        pytest.skip("needs a GPU")


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    """Tests of every backend ask the CUDA kernels for float64 too, which they refuse in so many words."""
    try:
        return (yield)
    except RuntimeError as error:
        if pyfuncitem.funcargs.get("backend") == "cuda" and "it takes float32, bfloat16 and float16" in str(error):
            pytest.skip("not in float64")
        raise


@pytest.fixture(scope="session", autouse=True)
def interpreter_rounds_to_nearest():
    """Triton's interpreter truncates float32 to bfloat16; GPUs round to nearest even, and so it does here."""
    if HAVE_GPU or find_spec("triton") is None:
        yield
        return
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    original = interpreter._convert_float

    def convert(values, source, target, rounding):
        if source != tl.float32 or target != tl.bfloat16:
            return original(values, source, target, rounding)
        bits = np.ascontiguousarray(values).view(np.uint32)
        rounded = ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return np.where(np.isnan(values), np.uint16(0x7FC0), rounded).reshape(values.shape)

    interpreter._convert_float = convert
    yield
    interpreter._convert_float = original


@pytest.fixture(scope="session", autouse=True)
def interpreter_of_any_version():
    """Before Triton 3.9 its interpreter took NaN for the larger of NaN and a number, as no GPU does unless it is told.
    That of 3.9 makes integers of a mask and a scalar, and refuses to load with what it made."""
    if HAVE_GPU or find_spec("triton") is None:
        yield
        return
    import numpy as np
    from triton.runtime.interpreter import InterpreterBuilder as Builder

    load, store = Builder.create_masked_load, Builder.create_masked_store

    def boolean(mask):
        mask.data = mask.data.astype(bool, copy=False)
        return mask

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Builder, "create_minnumf", lambda self, a, b: self.binary_op(a, b, np.fmin))
        patch.setattr(Builder, "create_maxnumf", lambda self, a, b: self.binary_op(a, b, np.fmax))
        patch.setattr(Builder, "create_masked_load", lambda self, at, m, *rest: load(self, at, boolean(m), *rest))
        patch.setattr(
            Builder, "create_masked_store", lambda self, at, v, m, *rest: store(self, at, v, boolean(m), *rest)
        )
        yield


@pytest.fixture(scope="session", autouse=True)
def interpreter_patches_once():
    """Triton's interpreter replaces all of triton.language at every call of every function; once a launch is enough.

    That is a third of the time of the interpreted tests, or more.
    """
    if HAVE_GPU or find_spec("triton") is None:
        yield
        return
    import triton.language as tl
    from triton.runtime import interpreter

    patch, launch, languages, patched = interpreter._patch_lang, interpreter.GridExecutor.__call__, {}, set()

    def patch_once(function):
        names = function.__globals__
        if id(names) not in languages:
            languages[id(names)] = any(v is tl for v in names.values()), any(v is tl.core for v in names.values())
        if languages[id(names)] in patched:
            return interpreter._LangPatchScope()
        patched.add(languages[id(names)])
        return patch(function)

    def launch_anew(executor, *args, **kwargs):
        patched.clear()
        return launch(executor, *args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, launch_anew
    yield
    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch, launch


@pytest.fixture(scope="session", autouse=True)
def interpreter_remembers_types():
    """Triton's interpreter works out the type and the shape of every value anew; most of them it had before.

    That is close to half of the time that is left. Types are what their names say, and nothing changes them.
    """
    if HAVE_GPU or find_spec("triton") is None:
        yield
        return
    import triton.language as tl
    from triton.language.semantic import TritonSemantic
    from triton.runtime import interpreter

    make_type, make_tensor = tl.block_type.__init__, tl.tensor.__init__
    find_numpy_type, broadcast = interpreter._get_np_dtype, TritonSemantic.broadcast_impl_value
    types, tensors, numpy_types = {}, {}, {}

    def remembered_type(self, element_type, shape):
        key = element_type.name, *(n.value if isinstance(n, tl.constexpr) else n for n in shape)
        if key not in types:
            make_type(self, element_type, shape)
            types[key] = vars(self).copy()
        vars(self).update(types[key])

    def remembered_tensor(self, handle, type):
        if type.name not in tensors:
            make_tensor(self, None, type)
            tensors[type.name] = vars(self).copy()
        vars(self).update(tensors[type.name], handle=handle)

    def remembered_numpy_type(type):
        if type.name not in numpy_types:
            numpy_types[type.name] = find_numpy_type(type)
        return numpy_types[type.name]

    def broadcast_others(self, lhs, rhs):
        alike = lhs.type.is_block() == rhs.type.is_block() and lhs.handle.data.shape == rhs.handle.data.shape
        return (lhs, rhs) if alike else broadcast(self, lhs, rhs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tl.block_type, "__init__", remembered_type)
        patch.setattr(tl.tensor, "__init__", remembered_tensor)
        patch.setattr(interpreter, "_get_np_dtype", remembered_numpy_type)
        patch.setattr(TritonSemantic, "broadcast_impl_value", broadcast_others)
        yield


@pytest.fixture
def device():
    return "cuda" if HAVE_GPU else "cpu"


@pytest.fixture
def poisoned_memory():
    """Memory that torch.empty and its kin hand out is full of NaN: whatever is read before it is written shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        # The fixture is worth nothing should torch change what it fills.
        x = torch.ones(3, 4).t()
        for empty in (torch.empty(2), torch.empty_like(x), x.new_empty(2), torch.empty_strided((2, 2), (2, 1))):
            assert empty.isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = fill
