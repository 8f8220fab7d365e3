# The C ABI of ktk for Cython, declaration by declaration as in ktk.h.

from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uintptr_t


cdef extern from "ktk.h" nogil:
    int KTK_ABI_VERSION

    ctypedef enum ktk_status:
        KTK_OK
        KTK_ERR_ARGUMENT
        KTK_ERR_UNSUPPORTED
        KTK_ERR_MEMORY
        KTK_ERR_SYSTEM
        KTK_ERR_STATE
        KTK_ERR_INTERNAL

    ctypedef enum ktk_dtype:
        KTK_DTYPE_F32
        KTK_DTYPE_BF16
        KTK_DTYPE_F16
        KTK_DTYPE_F8_E4M3

    ctypedef enum ktk_format:
        KTK_FORMAT_BF16
        KTK_FORMAT_INT8
        KTK_FORMAT_INT4
        KTK_FORMAT_FP8

    ctypedef enum ktk_part:
        KTK_PART_GATE_UP_WEIGHT
        KTK_PART_GATE_UP_SCALE
        KTK_PART_GATE_UP_FACTORS
        KTK_PART_DOWN_WEIGHT
        KTK_PART_DOWN_SCALE
        KTK_PART_DOWN_FACTORS
        KTK_PART_GATE_BIAS
        KTK_PART_UP_BIAS
        KTK_PART_DOWN_BIAS

    ctypedef enum ktk_policy:
        KTK_POLICY_NONE
        KTK_POLICY_SAVE
        KTK_POLICY_RECOMPUTE

    ctypedef struct ktk_pool:
        pass

    ctypedef struct ktk_moe:
        pass

    ctypedef struct ktk_sft:
        pass

    ctypedef struct ktk_sft_context:
        pass

    ctypedef struct ktk_queue:
        pass

    ctypedef struct ktk_trace:
        pass

    ctypedef struct ktk_probe:
        pass

    ctypedef int32_t (*ktk_task_fn)(void *context)

    ctypedef struct ktk_pool_config:
        uint32_t struct_size
        int32_t subpool_count
        const int32_t *subpool_numa_map
        const int32_t *subpool_thread_count
        int32_t bind_threads
        int64_t spin_ns

    ctypedef struct ktk_moe_config:
        uint32_t struct_size
        int32_t layer_index
        int32_t num_experts
        int32_t top_k
        int32_t hidden_size
        int32_t intermediate_size
        int32_t max_tokens
        int32_t format
        int32_t group_size
        int32_t strict
        float swiglu_limit
        float swiglu_alpha
        const char *isa
        const uint8_t *gpu_experts_mask
        int32_t rotated

    ctypedef struct ktk_expert_weights:
        uint32_t struct_size
        int32_t dtype
        const void *gate
        const void *up
        const void *down
        const float *gate_bias
        const float *up_bias
        const float *down_bias
        const float *gate_scale
        const float *up_scale
        const float *down_scale

    ctypedef struct ktk_forward_args:
        uint32_t struct_size
        int32_t top_k
        const int32_t *num_tokens
        const int64_t *expert_ids
        const float *expert_weights
        const void *input
        void *output
        int32_t input_dtype
        int32_t output_dtype
        int32_t incremental

    ctypedef enum ktk_probe_kind:
        KTK_PROBE_PRODUCT
        KTK_PROBE_READ
        KTK_PROBE_COPY

    ctypedef struct ktk_probe_config:
        uint32_t struct_size
        int32_t kind
        int32_t format
        const char *isa
        size_t bytes

    ctypedef struct ktk_sft_config:
        uint32_t struct_size
        int32_t lora_rank
        float lora_scale
        float lora_dropout
        int32_t skip_lora

    ctypedef struct ktk_lora_tensors:
        uint32_t struct_size
        int32_t dtype
        const void *gate_a
        const void *gate_b
        const void *up_a
        const void *up_b
        const void *down_a
        const void *down_b

    ctypedef struct ktk_sft_context_config:
        uint32_t struct_size
        int32_t policy
        int32_t dropout
        int64_t seed

    ctypedef struct ktk_backward_args:
        uint32_t struct_size
        int32_t grad_output_dtype
        const void *grad_output
        void *grad_input
        int32_t grad_input_dtype
        int32_t lora_dtype
        float *grad_expert_weights
        void *gate_a
        void *gate_b
        void *up_a
        void *up_b
        void *down_a
        void *down_b
        int32_t base_dtype
        int32_t accumulate
        void *gate
        void *up
        void *down

    const char *ktk_last_error()
    const char *ktk_version()
    int32_t ktk_abi_version()

    int32_t ktk_isa_count()
    const char *ktk_isa_name(int32_t index)
    ktk_status ktk_isa_check(const char *name)
    ktk_status ktk_isa_default(const char **name)
    ktk_status ktk_isa_kernel(const char *isa, int32_t format, int32_t rows, const char **kernel)

    ktk_status ktk_machine_json(char *buffer, size_t capacity, size_t *needed)

    ktk_status ktk_pool_create(const ktk_pool_config *config, ktk_pool **pool)
    ktk_status ktk_pool_destroy(ktk_pool *pool)
    ktk_status ktk_pool_threads(const ktk_pool *pool, int32_t *subpool_count, int32_t *thread_count)
    const char *ktk_pool_warnings(const ktk_pool *pool)
    ktk_status ktk_set_num_threads(int32_t num_threads)
    ktk_status ktk_get_num_threads(int32_t *num_threads)

    ktk_status ktk_moe_create(const ktk_moe_config *config, ktk_pool *pool, ktk_moe **moe)
    ktk_status ktk_moe_destroy(ktk_moe *moe)
    ktk_status ktk_moe_pack_expert(ktk_moe *moe, int32_t expert, const ktk_expert_weights *weights)
    ktk_status ktk_moe_part_bytes(const ktk_moe *moe, int32_t part, size_t *bytes)
    ktk_status ktk_moe_export_part(const ktk_moe *moe, int32_t expert, int32_t part, void *buffer, size_t bytes)
    ktk_status ktk_moe_import_part(ktk_moe *moe, int32_t expert, int32_t part, const void *buffer, size_t bytes)
    ktk_status ktk_moe_weight_bytes(const ktk_moe *moe, size_t *bytes)
    ktk_status ktk_moe_isa(const ktk_moe *moe, const char **name)
    ktk_status ktk_moe_forward(ktk_moe *moe, const ktk_forward_args *args)
    ktk_status ktk_moe_unpack_expert(const ktk_moe *moe, int32_t expert, float *gate, float *up, float *down)

    ktk_status ktk_sft_create(const ktk_sft_config *config, ktk_moe *moe, ktk_sft **sft)
    ktk_status ktk_sft_destroy(ktk_sft *sft)
    ktk_status ktk_sft_set_lora(ktk_sft *sft, const ktk_lora_tensors *tensors)
    ktk_status ktk_sft_context_create(ktk_sft *sft, const ktk_sft_context_config *config, ktk_sft_context **context)
    ktk_status ktk_sft_context_destroy(ktk_sft_context *context)
    ktk_status ktk_sft_context_size(const ktk_sft_context *context, int32_t *num_tokens, size_t *activation_bytes,
                                    size_t *table_bytes)
    ktk_status ktk_sft_forward(ktk_sft_context *context, const ktk_forward_args *args)
    ktk_status ktk_sft_backward(ktk_sft_context *context, const ktk_backward_args *args)

    ktk_status ktk_queue_create(ktk_pool *pool, ktk_queue **queue)
    ktk_status ktk_queue_destroy(ktk_queue *queue)
    ktk_status ktk_queue_submit(ktk_queue *queue, ktk_task_fn function, void *context)
    ktk_status ktk_queue_submit_forward(ktk_queue *queue, ktk_moe *moe, const ktk_forward_args *args)
    ktk_status ktk_queue_submit_sft_forward(ktk_queue *queue, ktk_sft_context *context, const ktk_forward_args *args)
    ktk_status ktk_queue_submit_sft_backward(ktk_queue *queue, ktk_sft_context *context, const ktk_backward_args *args)
    ktk_status ktk_queue_sync(ktk_queue *queue, int32_t allow_n_pending)
    ktk_status ktk_queue_submit_forward_with_cuda_stream(ktk_queue *queue, uintptr_t stream, ktk_moe *moe,
                                                         const ktk_forward_args *args)
    ktk_status ktk_queue_submit_with_cuda_stream(ktk_queue *queue, uintptr_t stream, ktk_task_fn function,
                                                 void *context)
    ktk_status ktk_queue_sync_with_cuda_stream(ktk_queue *queue, uintptr_t stream, int32_t allow_n_pending)
    ktk_status ktk_queue_pending(const ktk_queue *queue, int64_t *pending)

    ktk_status ktk_trace_start(int64_t spans_per_thread, ktk_trace **trace)
    ktk_status ktk_trace_stop(ktk_trace *trace)
    ktk_status ktk_trace_json(const ktk_trace *trace, char *buffer, size_t capacity, size_t *needed)
    ktk_status ktk_trace_write(const ktk_trace *trace, const char *path)
    ktk_status ktk_trace_destroy(ktk_trace *trace)

    ktk_status ktk_probe_create(const ktk_probe_config *config, ktk_pool *pool, ktk_probe **probe)
    ktk_status ktk_probe_destroy(ktk_probe *probe)
    ktk_status ktk_probe_variants(const ktk_probe *probe, int32_t *count)
    ktk_status ktk_probe_variant_name(const ktk_probe *probe, int32_t variant, const char **name)
    ktk_status ktk_probe_run(ktk_probe *probe, int32_t variant, int64_t repeats, double *work, double *seconds)
