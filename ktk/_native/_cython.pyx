# cython: language_level=3, embedsignature=True
"""The binding through Cython. What it exports is described in api.pyi."""

import atexit
import weakref

cimport cython
from cpython.long cimport PyLong_AsLongLongAndOverflow, PyLong_CheckExact
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uintptr_t
from libc.stdlib cimport free, malloc
from posix.unistd cimport usleep

from ktk._native cimport ktk as c
from ktk._native import _checks, _handles, _tasks
from ktk.errors import error_from_status

HEADER_ABI_VERSION = c.KTK_ABI_VERSION

DTYPE_F32 = <int>c.KTK_DTYPE_F32
DTYPE_BF16 = <int>c.KTK_DTYPE_BF16
DTYPE_F16 = <int>c.KTK_DTYPE_F16
DTYPE_F8_E4M3 = <int>c.KTK_DTYPE_F8_E4M3
FORMAT_BF16 = <int>c.KTK_FORMAT_BF16
FORMAT_INT8 = <int>c.KTK_FORMAT_INT8
FORMAT_INT4 = <int>c.KTK_FORMAT_INT4
FORMAT_FP8 = <int>c.KTK_FORMAT_FP8
PART_GATE_UP_WEIGHT = <int>c.KTK_PART_GATE_UP_WEIGHT
PART_GATE_UP_SCALE = <int>c.KTK_PART_GATE_UP_SCALE
PART_GATE_UP_FACTORS = <int>c.KTK_PART_GATE_UP_FACTORS
PART_DOWN_WEIGHT = <int>c.KTK_PART_DOWN_WEIGHT
PART_DOWN_SCALE = <int>c.KTK_PART_DOWN_SCALE
PART_DOWN_FACTORS = <int>c.KTK_PART_DOWN_FACTORS
PART_GATE_BIAS = <int>c.KTK_PART_GATE_BIAS
PART_UP_BIAS = <int>c.KTK_PART_UP_BIAS
PART_DOWN_BIAS = <int>c.KTK_PART_DOWN_BIAS
PROBE_PRODUCT = <int>c.KTK_PROBE_PRODUCT
PROBE_READ = <int>c.KTK_PROBE_READ
PROBE_COPY = <int>c.KTK_PROBE_COPY
POLICY_NONE = <int>c.KTK_POLICY_NONE
POLICY_SAVE = <int>c.KTK_POLICY_SAVE
POLICY_RECOMPUTE = <int>c.KTK_POLICY_RECOMPUTE


cdef int _check(c.ktk_status status) except -1:
    # The message belongs to this thread until its next call, so it is copied before anything else happens.
    cdef bytes message
    if status == c.KTK_OK:
        return 0
    message = c.ktk_last_error()
    raise error_from_status(<int>status, message.decode("utf-8", "replace"))


cdef int32_t _int32(str name, object value) except? -1:
    cdef int overflow = 0
    cdef long long number
    if PyLong_CheckExact(value):
        number = PyLong_AsLongLongAndOverflow(value, &overflow)
        if overflow == 0 and -0x80000000LL <= number <= 0x7FFFFFFFLL:
            return <int32_t>number
    return _checks.int32(name, value)


cdef uintptr_t _pointer(str name, object value, unsigned int alignment) except? 0:
    cdef int overflow = 0
    cdef long long address
    if PyLong_CheckExact(value):
        address = PyLong_AsLongLongAndOverflow(value, &overflow)
        if overflow == 0 and address > 0 and address % alignment == 0:
            return <uintptr_t>address
    return _checks.pointer(name, value, alignment)


cdef uintptr_t _optional_pointer(str name, object value, unsigned int alignment) except? 0:
    return _checks.optional_pointer(name, value, alignment)


cdef int32_t _dtype(str name, object value) except -1:
    return _checks.dtype(name, value)


cdef inline unsigned int _dtype_bytes(int32_t dtype) noexcept:
    return 4 if dtype == <int32_t>c.KTK_DTYPE_F32 else 2


cdef int _forward_args(
    c.ktk_forward_args *args, object num_tokens_ptr, object top_k, object expert_ids_ptr, object expert_weights_ptr,
    object input_ptr, object input_dtype, object output_ptr, object output_dtype, object incremental,
) except -1:
    args.struct_size = sizeof(c.ktk_forward_args)
    args.num_tokens = <const int32_t *>_pointer("num_tokens_ptr", num_tokens_ptr, 4)
    args.top_k = _int32("top_k", top_k)
    args.expert_ids = <const int64_t *>_pointer("expert_ids_ptr", expert_ids_ptr, 8)
    args.expert_weights = <const float *>_pointer("expert_weights_ptr", expert_weights_ptr, 4)
    args.input_dtype = _dtype("input_dtype", input_dtype)
    args.input = <const void *>_pointer("input_ptr", input_ptr, _dtype_bytes(args.input_dtype))
    args.output_dtype = _dtype("output_dtype", output_dtype)
    args.output = <void *>_pointer("output_ptr", output_ptr, _dtype_bytes(args.output_dtype))
    args.incremental = _checks.flag("incremental", incremental)
    return 0


cdef void *_address(str name, object value, int32_t dtype) except? NULL:
    return <void *>_optional_pointer(name, value, _dtype_bytes(dtype))


cdef int _backward_args(
    c.ktk_backward_args *args, object grad_output_ptr, object grad_output_dtype, object grad_input_ptr,
    object grad_input_dtype, object grad_expert_weights_ptr, object lora_dtype, object gate_a_ptr, object gate_b_ptr,
    object up_a_ptr, object up_b_ptr, object down_a_ptr, object down_b_ptr, object base_dtype, object gate_ptr,
    object up_ptr, object down_ptr, object accumulate,
) except -1:
    args.struct_size = sizeof(c.ktk_backward_args)
    args.grad_output_dtype = _dtype("grad_output_dtype", grad_output_dtype)
    args.grad_output = <const void *>_pointer("grad_output_ptr", grad_output_ptr, _dtype_bytes(args.grad_output_dtype))
    args.grad_input_dtype = _dtype("grad_input_dtype", grad_input_dtype)
    args.grad_input = _address("grad_input_ptr", grad_input_ptr, args.grad_input_dtype)
    args.grad_expert_weights = <float *>_optional_pointer("grad_expert_weights_ptr", grad_expert_weights_ptr, 4)
    args.lora_dtype = _dtype("lora_dtype", lora_dtype)
    args.gate_a = _address("gate_a_ptr", gate_a_ptr, args.lora_dtype)
    args.gate_b = _address("gate_b_ptr", gate_b_ptr, args.lora_dtype)
    args.up_a = _address("up_a_ptr", up_a_ptr, args.lora_dtype)
    args.up_b = _address("up_b_ptr", up_b_ptr, args.lora_dtype)
    args.down_a = _address("down_a_ptr", down_a_ptr, args.lora_dtype)
    args.down_b = _address("down_b_ptr", down_b_ptr, args.lora_dtype)
    args.base_dtype = _dtype("base_dtype", base_dtype)
    args.gate = _address("gate_ptr", gate_ptr, args.base_dtype)
    args.up = _address("up_ptr", up_ptr, args.base_dtype)
    args.down = _address("down_ptr", down_ptr, args.base_dtype)
    args.accumulate = _checks.flag("accumulate", accumulate)
    return 0


def version():
    return c.ktk_version().decode()


def abi_version():
    return c.ktk_abi_version()


def isa_names():
    cdef int32_t index
    return [c.ktk_isa_name(index).decode() for index in range(c.ktk_isa_count())]


def isa_check(name):
    cdef bytes encoded = _checks.text("name", name)
    _check(c.ktk_isa_check(encoded))


def isa_default():
    cdef const char *name = NULL
    _check(c.ktk_isa_default(&name))
    return name.decode()


def isa_kernel(isa, format, rows):
    cdef bytes encoded = _checks.text("isa", isa)
    cdef const char *kernel = NULL
    _check(c.ktk_isa_kernel(encoded, _int32("format", format), _int32("rows", rows), &kernel))
    return kernel.decode()


cdef str _json(c.ktk_trace *trace):
    # Of a trace, or with NULL of the machine. The text may grow between two calls: that of the machine if the
    # CUDA run time is loaded meanwhile.
    cdef size_t capacity = 16384
    cdef size_t needed = 0
    cdef char *buffer
    cdef c.ktk_status status
    while True:
        buffer = <char *>malloc(capacity)
        if buffer == NULL:
            raise MemoryError()
        try:
            with nogil:
                if trace == NULL:
                    status = c.ktk_machine_json(buffer, capacity, &needed)
                else:
                    status = c.ktk_trace_json(trace, buffer, capacity, &needed)
            if status == c.KTK_ERR_ARGUMENT and needed > capacity:
                capacity = needed
                continue
            _check(status)
            return buffer.decode()
        finally:
            free(buffer)


def machine_json():
    return _json(NULL)


def set_num_threads(num_threads):
    cdef int32_t count = _int32("num_threads", num_threads)
    _check(c.ktk_set_num_threads(count))


def get_num_threads():
    cdef int32_t count = 0
    _check(c.ktk_get_num_threads(&count))
    return count


@cython.no_gc_clear
cdef class Pool:
    cdef c.ktk_pool *handle
    cdef int calls
    cdef object __weakref__

    def __init__(self, subpool_thread_count, subpool_numa_map=None, bind_threads=True, spin_ns=-1):
        cdef c.ktk_pool_config config
        cdef c.ktk_pool *handle = NULL
        cdef c.ktk_status status
        cdef int32_t *numbers
        cdef Py_ssize_t count, index
        self.close()
        threads = _checks.int32_list("subpool_thread_count", subpool_thread_count)
        nodes = None
        if subpool_numa_map is not None:
            nodes = _checks.int32_list("subpool_numa_map", subpool_numa_map)
            _checks.same_length("subpool_thread_count", threads, "subpool_numa_map", nodes)
        config.struct_size = sizeof(config)
        config.bind_threads = _checks.flag("bind_threads", bind_threads)
        config.spin_ns = _checks.int64("spin_ns", spin_ns)
        count = len(threads)
        config.subpool_count = _int32("len(subpool_thread_count)", count)
        numbers = <int32_t *>malloc(2 * count * sizeof(int32_t))
        if numbers == NULL:
            raise MemoryError()
        try:
            for index in range(count):
                numbers[index] = threads[index]
                numbers[count + index] = nodes[index] if nodes is not None else 0
            config.subpool_thread_count = numbers
            config.subpool_numa_map = numbers + count if nodes is not None else NULL
            with nogil:
                status = c.ktk_pool_create(&config, &handle)
        finally:
            free(numbers)
        _check(status)
        self.handle = handle
        _handles.watch(self)

    def _forget_calls(self):
        self.calls = 0

    def __dealloc__(self):
        cdef c.ktk_pool *handle = self.handle
        if handle != NULL:
            with nogil:
                c.ktk_pool_destroy(handle)

    cdef c.ktk_pool *open(self) except NULL:
        if self.handle == NULL:
            raise _checks.closed("Pool")
        return self.handle

    @property
    def subpool_count(self):
        cdef c.ktk_pool *handle
        cdef int32_t subpools = 0, threads = 0
        handle = self.open()
        _check(c.ktk_pool_threads(handle, &subpools, &threads))
        return subpools

    @property
    def thread_count(self):
        cdef c.ktk_pool *handle
        cdef int32_t subpools = 0, threads = 0
        handle = self.open()
        _check(c.ktk_pool_threads(handle, &subpools, &threads))
        return threads

    @property
    def warnings(self):
        cdef c.ktk_pool *handle
        handle = self.open()
        return c.ktk_pool_warnings(handle).decode()

    @property
    def closed(self):
        return self.handle == NULL

    def close(self):
        cdef c.ktk_pool *handle = self.handle
        cdef c.ktk_status status
        if handle == NULL:
            return
        # Taken away first: nobody may start to use a handle that is about to go.
        self.handle = NULL
        while self.calls:
            with nogil:
                usleep(200)
        with nogil:
            status = c.ktk_pool_destroy(handle)
        if status != c.KTK_OK:
            self.handle = handle
        _check(status)

    def __enter__(self):
        self.open()
        return self

    def __exit__(self, kind, error, trace):
        self.close()


# Without no_gc_clear the collector could drop the pool of a layer in a reference cycle before the layer.
@cython.no_gc_clear
cdef class Moe:
    cdef c.ktk_moe *handle
    cdef Pool pool
    cdef int calls
    cdef object __weakref__

    def __init__(
        self, pool, *, num_experts, top_k, hidden_size, intermediate_size, max_tokens, format, group_size=0,
        strict=False, swiglu_limit=0.0, swiglu_alpha=0.0, isa=None, gpu_experts_mask_ptr=0, layer_index=0,
        rotated=False,
    ):
        cdef c.ktk_moe_config config
        cdef c.ktk_moe *handle = NULL
        cdef c.ktk_status status
        cdef bytes isa_bytes = None
        cdef Pool owner
        cdef c.ktk_pool *owner_handle
        self.close()
        _checks.instance("pool", pool, Pool)
        owner = pool
        config.struct_size = sizeof(config)
        config.layer_index = _int32("layer_index", layer_index)
        config.num_experts = _int32("num_experts", num_experts)
        config.top_k = _int32("top_k", top_k)
        config.hidden_size = _int32("hidden_size", hidden_size)
        config.intermediate_size = _int32("intermediate_size", intermediate_size)
        config.max_tokens = _int32("max_tokens", max_tokens)
        config.format = _int32("format", format)
        config.group_size = _int32("group_size", group_size)
        config.strict = _checks.flag("strict", strict)
        config.swiglu_limit = _checks.number("swiglu_limit", swiglu_limit)
        config.swiglu_alpha = _checks.number("swiglu_alpha", swiglu_alpha)
        config.isa = NULL
        if isa is not None:
            isa_bytes = _checks.text("isa", isa)
            config.isa = isa_bytes
        config.gpu_experts_mask = <const uint8_t *>_optional_pointer("gpu_experts_mask_ptr", gpu_experts_mask_ptr, 1)
        config.rotated = _checks.flag("rotated", rotated)
        owner_handle = owner.open()
        owner.calls += 1
        try:
            with nogil:
                status = c.ktk_moe_create(&config, owner_handle, &handle)
            _check(status)
        finally:
            owner.calls -= 1
        self.handle = handle
        _handles.watch(self)
        self.pool = owner

    def _forget_calls(self):
        self.calls = 0

    def __dealloc__(self):
        cdef c.ktk_moe *handle = self.handle
        if handle != NULL:
            with nogil:
                c.ktk_moe_destroy(handle)

    cdef c.ktk_moe *open(self) except NULL:
        if self.handle == NULL:
            raise _checks.closed("Moe")
        return self.handle

    @property
    def isa(self):
        cdef c.ktk_moe *handle
        cdef const char *name = NULL
        handle = self.open()
        _check(c.ktk_moe_isa(handle, &name))
        return name.decode()

    @property
    def weight_bytes(self):
        cdef c.ktk_moe *handle
        cdef size_t size = 0
        handle = self.open()
        _check(c.ktk_moe_weight_bytes(handle, &size))
        return size

    @property
    def closed(self):
        return self.handle == NULL

    def pack_expert(
        self,
        expert,
        dtype,
        gate_ptr,
        up_ptr,
        down_ptr,
        gate_bias_ptr=0,
        up_bias_ptr=0,
        down_bias_ptr=0,
        gate_scale_ptr=0,
        up_scale_ptr=0,
        down_scale_ptr=0,
    ):
        cdef c.ktk_moe *handle
        cdef c.ktk_expert_weights weights
        cdef c.ktk_status status
        cdef int32_t index = _int32("expert", expert)
        cdef unsigned int alignment
        weights.struct_size = sizeof(weights)
        weights.dtype = _checks.weight_dtype("dtype", dtype)
        alignment = _checks.WEIGHT_DTYPE_BYTES[weights.dtype]
        weights.gate = <const void *>_pointer("gate_ptr", gate_ptr, alignment)
        weights.up = <const void *>_pointer("up_ptr", up_ptr, alignment)
        weights.down = <const void *>_pointer("down_ptr", down_ptr, alignment)
        weights.gate_bias = <const float *>_optional_pointer("gate_bias_ptr", gate_bias_ptr, 4)
        weights.up_bias = <const float *>_optional_pointer("up_bias_ptr", up_bias_ptr, 4)
        weights.down_bias = <const float *>_optional_pointer("down_bias_ptr", down_bias_ptr, 4)
        weights.gate_scale = <const float *>_optional_pointer("gate_scale_ptr", gate_scale_ptr, 4)
        weights.up_scale = <const float *>_optional_pointer("up_scale_ptr", up_scale_ptr, 4)
        weights.down_scale = <const float *>_optional_pointer("down_scale_ptr", down_scale_ptr, 4)
        handle = self.open()
        self.calls += 1
        try:
            with nogil:
                status = c.ktk_moe_pack_expert(handle, index, &weights)
            _check(status)
        finally:
            self.calls -= 1

    def part_bytes(self, part):
        cdef c.ktk_moe *handle
        cdef size_t size = 0
        cdef int32_t index = _int32("part", part)
        handle = self.open()
        _check(c.ktk_moe_part_bytes(handle, index, &size))
        return size

    def export_part(self, expert, part, ptr, bytes):
        cdef c.ktk_moe *handle
        cdef c.ktk_status status
        cdef int32_t expert_index = _int32("expert", expert), part_index = _int32("part", part)
        cdef void *buffer = <void *>_pointer("ptr", ptr, 1)
        cdef size_t size = _checks.size("bytes", bytes)
        handle = self.open()
        self.calls += 1
        try:
            with nogil:
                status = c.ktk_moe_export_part(handle, expert_index, part_index, buffer, size)
            _check(status)
        finally:
            self.calls -= 1

    def import_part(self, expert, part, ptr, bytes):
        cdef c.ktk_moe *handle
        cdef c.ktk_status status
        cdef int32_t expert_index = _int32("expert", expert), part_index = _int32("part", part)
        cdef const void *buffer = <const void *>_pointer("ptr", ptr, 1)
        cdef size_t size = _checks.size("bytes", bytes)
        handle = self.open()
        self.calls += 1
        try:
            with nogil:
                status = c.ktk_moe_import_part(handle, expert_index, part_index, buffer, size)
            _check(status)
        finally:
            self.calls -= 1

    def forward(
        self, num_tokens_ptr, top_k, expert_ids_ptr, expert_weights_ptr, input_ptr, input_dtype, output_ptr,
        output_dtype, incremental=False,
    ):
        cdef c.ktk_moe *handle
        cdef c.ktk_forward_args args
        cdef c.ktk_status status
        _forward_args(
            &args, num_tokens_ptr, top_k, expert_ids_ptr, expert_weights_ptr, input_ptr, input_dtype, output_ptr,
            output_dtype, incremental,
        )
        handle = self.open()
        self.calls += 1
        try:
            with nogil:
                status = c.ktk_moe_forward(handle, &args)
            _check(status)
        finally:
            self.calls -= 1

    def unpack_expert(self, expert, gate_ptr=0, up_ptr=0, down_ptr=0):
        cdef c.ktk_moe *handle
        cdef c.ktk_status status
        cdef int32_t index = _int32("expert", expert)
        cdef float *gate = <float *>_optional_pointer("gate_ptr", gate_ptr, 4)
        cdef float *up = <float *>_optional_pointer("up_ptr", up_ptr, 4)
        cdef float *down = <float *>_optional_pointer("down_ptr", down_ptr, 4)
        handle = self.open()
        self.calls += 1
        try:
            with nogil:
                status = c.ktk_moe_unpack_expert(handle, index, gate, up, down)
            _check(status)
        finally:
            self.calls -= 1

    def close(self):
        cdef c.ktk_moe *handle = self.handle
        cdef c.ktk_status status
        if handle == NULL:
            return
        self.handle = NULL
        while self.calls:
            with nogil:
                usleep(200)
        with nogil:
            status = c.ktk_moe_destroy(handle)
        if status != c.KTK_OK:
            self.handle = handle
        _check(status)
        self.pool = None

    def __enter__(self):
        self.open()
        return self

    def __exit__(self, kind, error, trace):
        self.close()


@cython.no_gc_clear
cdef class Sft:
    cdef c.ktk_sft *handle
    cdef Moe moe
    cdef int calls
    cdef object __weakref__

    def __init__(self, moe, *, lora_rank=0, lora_scale=1.0, lora_dropout=0.0, skip_lora=False):
        cdef c.ktk_sft_config config
        cdef c.ktk_sft *handle = NULL
        cdef c.ktk_status status
        cdef Moe owner
        cdef c.ktk_moe *owner_handle
        self.close()
        _checks.instance("moe", moe, Moe)
        owner = moe
        config.struct_size = sizeof(config)
        config.lora_rank = _int32("lora_rank", lora_rank)
        config.lora_scale = _checks.number("lora_scale", lora_scale)
        config.lora_dropout = _checks.number("lora_dropout", lora_dropout)
        config.skip_lora = _checks.flag("skip_lora", skip_lora)
        owner_handle = owner.open()
        owner.calls += 1
        try:
            with nogil:
                status = c.ktk_sft_create(&config, owner_handle, &handle)
            _check(status)
        finally:
            owner.calls -= 1
        self.handle = handle
        self.moe = owner

    def __dealloc__(self):
        cdef c.ktk_sft *handle = self.handle
        if handle != NULL:
            with nogil:
                c.ktk_sft_destroy(handle)

    cdef c.ktk_sft *open(self) except NULL:
        if self.handle == NULL:
            raise _checks.closed("Sft")
        return self.handle

    @property
    def closed(self):
        return self.handle == NULL

    def set_lora(self, dtype, gate_a_ptr, gate_b_ptr, up_a_ptr, up_b_ptr, down_a_ptr, down_b_ptr):
        cdef c.ktk_sft *handle
        cdef c.ktk_lora_tensors tensors
        cdef c.ktk_status status
        cdef unsigned int alignment
        tensors.struct_size = sizeof(tensors)
        tensors.dtype = _dtype("dtype", dtype)
        alignment = _dtype_bytes(tensors.dtype)
        tensors.gate_a = <const void *>_pointer("gate_a_ptr", gate_a_ptr, alignment)
        tensors.gate_b = <const void *>_pointer("gate_b_ptr", gate_b_ptr, alignment)
        tensors.up_a = <const void *>_pointer("up_a_ptr", up_a_ptr, alignment)
        tensors.up_b = <const void *>_pointer("up_b_ptr", up_b_ptr, alignment)
        tensors.down_a = <const void *>_pointer("down_a_ptr", down_a_ptr, alignment)
        tensors.down_b = <const void *>_pointer("down_b_ptr", down_b_ptr, alignment)
        handle = self.open()
        self.calls += 1
        try:
            with nogil:
                status = c.ktk_sft_set_lora(handle, &tensors)
            _check(status)
        finally:
            self.calls -= 1

    def close(self):
        cdef c.ktk_sft *handle = self.handle
        cdef c.ktk_status status
        if handle == NULL:
            return
        self.handle = NULL
        while self.calls:
            with nogil:
                usleep(200)
        with nogil:
            status = c.ktk_sft_destroy(handle)
        if status != c.KTK_OK:
            self.handle = handle
        _check(status)
        self.moe = None

    def __enter__(self):
        self.open()
        return self

    def __exit__(self, kind, error, trace):
        self.close()


@cython.no_gc_clear
cdef class SftContext:
    cdef c.ktk_sft_context *handle
    cdef Sft sft
    cdef int calls
    cdef object __weakref__

    def __init__(self, sft, policy, dropout=False, seed=0):
        cdef c.ktk_sft_context_config config
        cdef c.ktk_sft_context *handle = NULL
        cdef c.ktk_status status
        cdef Sft owner
        cdef c.ktk_sft *owner_handle
        self.close()
        _checks.instance("sft", sft, Sft)
        owner = sft
        config.struct_size = sizeof(config)
        config.policy = _int32("policy", policy)
        config.dropout = _checks.flag("dropout", dropout)
        config.seed = _checks.int64("seed", seed)
        owner_handle = owner.open()
        owner.calls += 1
        try:
            with nogil:
                status = c.ktk_sft_context_create(owner_handle, &config, &handle)
            _check(status)
        finally:
            owner.calls -= 1
        self.handle = handle
        self.sft = owner

    def __dealloc__(self):
        cdef c.ktk_sft_context *handle = self.handle
        if handle != NULL:
            with nogil:
                c.ktk_sft_context_destroy(handle)

    cdef c.ktk_sft_context *open(self) except NULL:
        if self.handle == NULL:
            raise _checks.closed("SftContext")
        return self.handle

    @property
    def closed(self):
        return self.handle == NULL

    cdef tuple size(self):
        cdef c.ktk_sft_context *handle = self.open()
        cdef c.ktk_status status
        cdef int32_t tokens = 0
        cdef size_t activations = 0, tables = 0
        self.calls += 1
        try:
            with nogil:
                status = c.ktk_sft_context_size(handle, &tokens, &activations, &tables)
            _check(status)
        finally:
            self.calls -= 1
        return tokens, activations, tables

    @property
    def num_tokens(self):
        return self.size()[0]

    @property
    def activation_bytes(self):
        return self.size()[1]

    @property
    def table_bytes(self):
        return self.size()[2]

    def forward(
        self, num_tokens_ptr, top_k, expert_ids_ptr, expert_weights_ptr, input_ptr, input_dtype, output_ptr,
        output_dtype, incremental=False,
    ):
        cdef c.ktk_sft_context *handle
        cdef c.ktk_forward_args args
        cdef c.ktk_status status
        _forward_args(
            &args, num_tokens_ptr, top_k, expert_ids_ptr, expert_weights_ptr, input_ptr, input_dtype, output_ptr,
            output_dtype, incremental,
        )
        handle = self.open()
        self.calls += 1
        try:
            with nogil:
                status = c.ktk_sft_forward(handle, &args)
            _check(status)
        finally:
            self.calls -= 1

    def backward(
        self, grad_output_ptr, grad_output_dtype, grad_input_ptr, grad_input_dtype, grad_expert_weights_ptr, *,
        lora_dtype=0, gate_a_ptr=0, gate_b_ptr=0, up_a_ptr=0, up_b_ptr=0, down_a_ptr=0, down_b_ptr=0,
        base_dtype=0, gate_ptr=0, up_ptr=0, down_ptr=0, accumulate=False,
    ):
        cdef c.ktk_sft_context *handle
        cdef c.ktk_backward_args args
        cdef c.ktk_status status
        _backward_args(
            &args, grad_output_ptr, grad_output_dtype, grad_input_ptr, grad_input_dtype, grad_expert_weights_ptr,
            lora_dtype, gate_a_ptr, gate_b_ptr, up_a_ptr, up_b_ptr, down_a_ptr, down_b_ptr, base_dtype, gate_ptr, up_ptr,
            down_ptr, accumulate,
        )
        handle = self.open()
        self.calls += 1
        try:
            with nogil:
                status = c.ktk_sft_backward(handle, &args)
            _check(status)
        finally:
            self.calls -= 1

    def close(self):
        cdef c.ktk_sft_context *handle = self.handle
        cdef c.ktk_status status
        if handle == NULL:
            return
        self.handle = NULL
        while self.calls:
            with nogil:
                usleep(200)
        with nogil:
            status = c.ktk_sft_context_destroy(handle)
        if status != c.KTK_OK:
            self.handle = handle
        _check(status)
        self.sft = None

    def __enter__(self):
        self.open()
        return self

    def __exit__(self, kind, error, trace):
        self.close()


cdef int32_t _run_task(void *context) noexcept with gil:
    try:
        return _tasks.run_task(<uintptr_t>context)
    except BaseException:
        return 1


_open_queues = weakref.WeakSet()


@cython.no_gc_clear
cdef class Queue:
    cdef c.ktk_queue *handle
    cdef Pool pool
    cdef object tasks
    cdef int calls
    cdef object __weakref__

    def __init__(self, pool):
        cdef c.ktk_queue *handle = NULL
        cdef c.ktk_status status
        cdef Pool owner
        cdef c.ktk_pool *owner_handle
        self.close()
        _checks.instance("pool", pool, Pool)
        owner = pool
        owner_handle = owner.open()
        owner.calls += 1
        try:
            with nogil:
                status = c.ktk_queue_create(owner_handle, &handle)
            _check(status)
        finally:
            owner.calls -= 1
        self.handle = handle
        _handles.watch(self)
        self.pool = owner
        self.tasks = _tasks.QueueTasks()
        _open_queues.add(self)

    def _forget_calls(self):
        self.calls = 0

    def __dealloc__(self):
        cdef c.ktk_queue *handle = self.handle
        if handle != NULL:
            with nogil:
                c.ktk_queue_destroy(handle)

    cdef c.ktk_queue *open(self) except NULL:
        if self.handle == NULL:
            raise _checks.closed("Queue")
        return self.handle

    cdef int finish(self, c.ktk_status status) except -1:
        # Without a native failure only that of a callable is raised; with both, the native one is its context.
        try:
            _check(status)
        except Exception:
            failure = self.tasks.take_failure()
            if failure is None:
                raise
            raise failure
        failure = self.tasks.take_failure()
        if failure is not None:
            raise failure
        return 0

    @property
    def pending(self):
        cdef c.ktk_queue *handle
        cdef int64_t count = 0
        handle = self.open()
        _check(c.ktk_queue_pending(handle, &count))
        return count

    @property
    def closed(self):
        return self.handle == NULL

    def submit(self, function):
        cdef c.ktk_queue *handle
        cdef c.ktk_status status
        cdef uintptr_t key
        _checks.function(function)
        handle = self.open()
        self.calls += 1
        try:
            key = self.tasks.add(function)
            with nogil:
                status = c.ktk_queue_submit(handle, _run_task, <void *>key)
            if status != c.KTK_OK:
                self.tasks.discard(key)
            _check(status)
        finally:
            self.calls -= 1

    def submit_with_cuda_stream(self, stream, function):
        cdef c.ktk_queue *handle
        cdef c.ktk_status status
        cdef uintptr_t key
        cdef uintptr_t address = _checks.stream(stream)
        _checks.function(function)
        handle = self.open()
        self.calls += 1
        try:
            key = self.tasks.add_replayable(function)
            with nogil:
                status = c.ktk_queue_submit_with_cuda_stream(handle, address, _run_task, <void *>key)
            _check(status)
        finally:
            self.calls -= 1

    def submit_forward(
        self, moe, num_tokens_ptr, top_k, expert_ids_ptr, expert_weights_ptr, input_ptr, input_dtype, output_ptr,
        output_dtype, incremental=False,
    ):
        cdef c.ktk_queue *handle
        cdef c.ktk_forward_args args
        cdef c.ktk_status status
        cdef Moe layer
        cdef c.ktk_moe *layer_handle
        _checks.instance("moe", moe, Moe)
        layer = moe
        _forward_args(
            &args, num_tokens_ptr, top_k, expert_ids_ptr, expert_weights_ptr, input_ptr, input_dtype, output_ptr,
            output_dtype, incremental,
        )
        handle = self.open()
        layer_handle = layer.open()
        # Counted calls keep close() of another thread from freeing a handle that is in use.
        self.calls += 1
        layer.calls += 1
        try:
            with nogil:
                status = c.ktk_queue_submit_forward(handle, layer_handle, &args)
            _check(status)
        finally:
            layer.calls -= 1
            self.calls -= 1

    def submit_forward_with_cuda_stream(
        self, stream, moe, num_tokens_ptr, top_k, expert_ids_ptr, expert_weights_ptr, input_ptr, input_dtype,
        output_ptr, output_dtype, incremental=False,
    ):
        cdef c.ktk_queue *handle
        cdef c.ktk_forward_args args
        cdef c.ktk_status status
        cdef uintptr_t address = _checks.stream(stream)
        cdef Moe layer
        cdef c.ktk_moe *layer_handle
        _checks.instance("moe", moe, Moe)
        layer = moe
        _forward_args(
            &args, num_tokens_ptr, top_k, expert_ids_ptr, expert_weights_ptr, input_ptr, input_dtype, output_ptr,
            output_dtype, incremental,
        )
        handle = self.open()
        layer_handle = layer.open()
        self.calls += 1
        layer.calls += 1
        try:
            with nogil:
                status = c.ktk_queue_submit_forward_with_cuda_stream(handle, address, layer_handle, &args)
            _check(status)
        finally:
            layer.calls -= 1
            self.calls -= 1

    def submit_sft_forward(
        self, context, num_tokens_ptr, top_k, expert_ids_ptr, expert_weights_ptr, input_ptr, input_dtype, output_ptr,
        output_dtype, incremental=False,
    ):
        cdef c.ktk_queue *handle
        cdef c.ktk_forward_args args
        cdef c.ktk_status status
        cdef SftContext saved
        cdef c.ktk_sft_context *saved_handle
        _checks.instance("context", context, SftContext)
        saved = context
        _forward_args(
            &args, num_tokens_ptr, top_k, expert_ids_ptr, expert_weights_ptr, input_ptr, input_dtype, output_ptr,
            output_dtype, incremental,
        )
        handle = self.open()
        saved_handle = saved.open()
        self.calls += 1
        saved.calls += 1
        try:
            with nogil:
                status = c.ktk_queue_submit_sft_forward(handle, saved_handle, &args)
            _check(status)
        finally:
            saved.calls -= 1
            self.calls -= 1

    def submit_sft_backward(
        self, context, grad_output_ptr, grad_output_dtype, grad_input_ptr, grad_input_dtype, grad_expert_weights_ptr, *,
        lora_dtype=0, gate_a_ptr=0, gate_b_ptr=0, up_a_ptr=0, up_b_ptr=0, down_a_ptr=0, down_b_ptr=0,
        base_dtype=0, gate_ptr=0, up_ptr=0, down_ptr=0, accumulate=False,
    ):
        cdef c.ktk_queue *handle
        cdef c.ktk_backward_args args
        cdef c.ktk_status status
        cdef SftContext saved
        cdef c.ktk_sft_context *saved_handle
        _checks.instance("context", context, SftContext)
        saved = context
        _backward_args(
            &args, grad_output_ptr, grad_output_dtype, grad_input_ptr, grad_input_dtype, grad_expert_weights_ptr,
            lora_dtype, gate_a_ptr, gate_b_ptr, up_a_ptr, up_b_ptr, down_a_ptr, down_b_ptr, base_dtype, gate_ptr, up_ptr,
            down_ptr, accumulate,
        )
        handle = self.open()
        saved_handle = saved.open()
        self.calls += 1
        saved.calls += 1
        try:
            with nogil:
                status = c.ktk_queue_submit_sft_backward(handle, saved_handle, &args)
            _check(status)
        finally:
            saved.calls -= 1
            self.calls -= 1

    def sync(self, allow_n_pending=0):
        cdef c.ktk_queue *handle
        cdef c.ktk_status status
        cdef int32_t allowed = _int32("allow_n_pending", allow_n_pending)
        handle = self.open()
        if self.tasks.on_own_thread():
            raise _checks.own_task("sync")
        self.calls += 1
        try:
            with nogil:
                status = c.ktk_queue_sync(handle, allowed)
            self.finish(status)
        finally:
            self.calls -= 1

    def sync_with_cuda_stream(self, stream, allow_n_pending=0):
        cdef c.ktk_queue *handle
        cdef c.ktk_status status
        cdef uintptr_t address = _checks.stream(stream)
        cdef int32_t allowed = _int32("allow_n_pending", allow_n_pending)
        handle = self.open()
        if self.tasks.on_own_thread():
            raise _checks.own_task("sync_with_cuda_stream")
        self.calls += 1
        try:
            with nogil:
                status = c.ktk_queue_sync_with_cuda_stream(handle, address, allowed)
            self.finish(status)
        finally:
            self.calls -= 1

    def close(self):
        cdef c.ktk_queue *handle = self.handle
        cdef c.ktk_status status
        if handle == NULL:
            return
        if self.tasks.on_own_thread():
            raise _checks.own_task("close")
        self.handle = NULL
        while self.calls:
            with nogil:
                usleep(200)
        with nogil:
            status = c.ktk_queue_destroy(handle)
        if status != c.KTK_OK:
            self.handle = handle
        _check(status)
        self.tasks = None
        self.pool = None

    def __enter__(self):
        self.open()
        return self

    def __exit__(self, kind, error, trace):
        self.close()


cdef class Trace:
    cdef c.ktk_trace *handle
    cdef int calls
    cdef object __weakref__

    def __init__(self, spans_per_thread=0):
        cdef c.ktk_trace *handle = NULL
        cdef c.ktk_status status
        cdef int64_t spans = _checks.int64("spans_per_thread", spans_per_thread)
        self.close()
        with nogil:
            status = c.ktk_trace_start(spans, &handle)
        _check(status)
        self.handle = handle
        _handles.watch(self)

    def _forget_calls(self):
        self.calls = 0

    def __dealloc__(self):
        cdef c.ktk_trace *handle = self.handle
        if handle != NULL:
            with nogil:
                c.ktk_trace_destroy(handle)

    cdef c.ktk_trace *open(self) except NULL:
        if self.handle == NULL:
            raise _checks.closed("Trace")
        return self.handle

    @property
    def closed(self):
        return self.handle == NULL

    def stop(self):
        cdef c.ktk_trace *handle = self.open()
        cdef c.ktk_status status
        self.calls += 1
        try:
            with nogil:
                status = c.ktk_trace_stop(handle)
            _check(status)
        finally:
            self.calls -= 1

    def json(self):
        cdef c.ktk_trace *handle = self.open()
        self.calls += 1
        try:
            return _json(handle)
        finally:
            self.calls -= 1

    def write(self, path):
        cdef bytes encoded = _checks.path(path)
        cdef const char *name = encoded
        cdef c.ktk_trace *handle = self.open()
        cdef c.ktk_status status
        self.calls += 1
        try:
            with nogil:
                status = c.ktk_trace_write(handle, name)
            _check(status)
        finally:
            self.calls -= 1

    def close(self):
        cdef c.ktk_trace *handle = self.handle
        cdef c.ktk_status status
        if handle == NULL:
            return
        self.handle = NULL
        while self.calls:
            with nogil:
                usleep(200)
        with nogil:
            status = c.ktk_trace_destroy(handle)
        if status != c.KTK_OK:
            self.handle = handle
        _check(status)

    def __enter__(self):
        self.open()
        return self

    def __exit__(self, kind, error, trace):
        self.close()


# As for Moe.
@cython.no_gc_clear
cdef class Probe:
    cdef c.ktk_probe *handle
    cdef Pool pool
    cdef int calls
    cdef object __weakref__

    def __init__(self, pool, *, kind, format=0, bytes=0, isa=None):
        cdef c.ktk_probe_config config
        cdef c.ktk_probe *handle = NULL
        cdef c.ktk_status status
        cdef const char *isa_text = NULL
        cdef Pool owner
        cdef c.ktk_pool *owner_handle
        self.close()
        _checks.instance("pool", pool, Pool)
        owner = pool
        config.struct_size = sizeof(config)
        config.kind = _int32("kind", kind)
        config.format = _int32("format", format)
        config.bytes = _checks.size("bytes", bytes)
        encoded = None if isa is None else _checks.text("isa", isa)
        if encoded is not None:
            isa_text = encoded
        config.isa = isa_text
        owner_handle = owner.open()
        owner.calls += 1
        try:
            with nogil:
                status = c.ktk_probe_create(&config, owner_handle, &handle)
            _check(status)
        finally:
            owner.calls -= 1
        self.handle = handle
        self.pool = owner

    def __dealloc__(self):
        cdef c.ktk_probe *handle = self.handle
        if handle != NULL:
            with nogil:
                c.ktk_probe_destroy(handle)

    cdef c.ktk_probe *open(self) except NULL:
        if self.handle == NULL:
            raise _checks.closed("Probe")
        return self.handle

    @property
    def closed(self):
        return self.handle == NULL

    @property
    def variants(self):
        cdef c.ktk_probe *handle
        cdef const char *name = NULL
        cdef int32_t count = 0, variant
        handle = self.open()
        _check(c.ktk_probe_variants(handle, &count))
        names = []
        for variant in range(count):
            _check(c.ktk_probe_variant_name(handle, variant, &name))
            names.append(name.decode())
        return names

    def run(self, variant, repeats=1):
        cdef c.ktk_probe *handle
        cdef c.ktk_status status
        cdef int32_t index = _int32("variant", variant)
        cdef int64_t rounds = _checks.int64("repeats", repeats)
        cdef double work = 0, seconds = 0
        handle = self.open()
        self.calls += 1
        try:
            with nogil:
                status = c.ktk_probe_run(handle, index, rounds, &work, &seconds)
            _check(status)
        finally:
            self.calls -= 1
        return work, seconds

    def close(self):
        cdef c.ktk_probe *handle = self.handle
        cdef c.ktk_status status
        if handle == NULL:
            return
        self.handle = NULL
        while self.calls:
            with nogil:
                usleep(200)
        with nogil:
            status = c.ktk_probe_destroy(handle)
        if status != c.KTK_OK:
            self.handle = handle
        _check(status)
        self.pool = None

    def __enter__(self):
        self.open()
        return self

    def __exit__(self, kind, error, trace):
        self.close()


def _finish_queues():
    # A callable that starts after the interpreter began to shut down could not take the GIL any more.
    cdef Queue queue
    for queue in list(_open_queues):
        if queue.handle != NULL:
            with nogil:
                c.ktk_queue_sync(queue.handle, 0)


atexit.register(_finish_queues)
