/* ktk C ABI: Mixture-of-experts layers on the CPU.
 *
 * Every function returns a ktk_status unless its comment says otherwise. On failure the message of
 * the calling thread is available from ktk_last_error() until that thread's next ktk call. Nothing
 * here prints, aborts, exits or throws. Callers own every buffer they pass in. A struct starts with
 * `struct_size`, set by the caller to sizeof(struct), so that callers built against an older header
 * keep working. Pointers that a comment calls "kept" must outlive the handle; all others are only
 * read during the call.
 *
 * The file keeps to a regular subset of C (one declaration a statement, no macros inside
 * declarations besides KTK_API), because the Cython and ctypes bindings are tested against it.
 */
#ifndef KTK_H
#define KTK_H

#include <stddef.h>
#include <stdint.h>

#define KTK_API __attribute__((visibility("default")))
#define KTK_ABI_VERSION 1

#ifdef __cplusplus
extern "C" {
#endif

/* ---- status ---------------------------------------------------------------------------------- */

typedef enum ktk_status {
  KTK_OK = 0,
  KTK_ERR_ARGUMENT = 1,    /* a value the caller passed is wrong */
  KTK_ERR_UNSUPPORTED = 2, /* this CPU or build cannot do it */
  KTK_ERR_MEMORY = 3,      /* an allocation failed */
  KTK_ERR_SYSTEM = 4,      /* the operating system or the CUDA runtime refused */
  KTK_ERR_STATE = 5,       /* the handle is not in a state that allows the call */
  KTK_ERR_INTERNAL = 6     /* a defect of ktk */
} ktk_status;

/* Message of this thread's last failed call; "" when it succeeded. Never NULL. */
KTK_API const char *ktk_last_error(void);
/* Library version, as "1.2.3". */
KTK_API const char *ktk_version(void);
/* KTK_ABI_VERSION of the library, to be compared with the header's. */
KTK_API int32_t ktk_abi_version(void);

/* ---- enumerations ---------------------------------------------------------------------------- */

typedef enum ktk_dtype {
  KTK_DTYPE_F32 = 0,
  KTK_DTYPE_BF16 = 1,
  KTK_DTYPE_F16 = 2,
  KTK_DTYPE_F8_E4M3 = 3 /* only of ktk_expert_weights; no infinities, 0x7f and 0xff are NaN */
} ktk_dtype;

typedef enum ktk_format {
  KTK_FORMAT_BF16 = 0, /* bf16 weights, bf16 activations */
  KTK_FORMAT_INT8 = 1, /* 8-bit weights with one scale a group or a row, int8 activations */
  KTK_FORMAT_INT4 =
      2,             /* 4-bit weights with integer factors a group under one scale a row, int8 activations */
  KTK_FORMAT_FP8 = 3 /* e4m3 weights with one scale for 128 columns of a row, bf16 activations */
} ktk_format;

/* The pieces of one packed expert, in the order of ktk_moe_part_bytes. docs/formats.md has the layouts. */
typedef enum ktk_part {
  KTK_PART_GATE_UP_WEIGHT = 0,
  KTK_PART_GATE_UP_SCALE = 1,
  KTK_PART_GATE_UP_FACTORS = 2,
  KTK_PART_DOWN_WEIGHT = 3,
  KTK_PART_DOWN_SCALE = 4,
  KTK_PART_DOWN_FACTORS = 5,
  KTK_PART_GATE_BIAS = 6,
  KTK_PART_UP_BIAS = 7,
  KTK_PART_DOWN_BIAS = 8
} ktk_part;

/* ---- instruction sets ------------------------------------------------------------------------ */

/* Number of instruction sets this library was built for. */
KTK_API int32_t ktk_isa_count(void);
/* Name of the set at `index`, in order of preference, best first; NULL past the end. */
KTK_API const char *ktk_isa_name(int32_t index);
/* KTK_OK when this CPU can run the set; otherwise KTK_ERR_UNSUPPORTED with the missing requirement
 * as message. */
KTK_API ktk_status ktk_isa_check(const char *name);
/* The set used by layers that name none: KTK_ISA from the environment when it is set, else the best
 * runnable one. KTK_ERR_UNSUPPORTED when KTK_ISA names one that cannot run here. */
KTK_API ktk_status ktk_isa_default(const char **name);
/* Name of the kernel that a layer of `format` on `isa` uses for an expert with `rows` tokens. */
KTK_API ktk_status ktk_isa_kernel(const char *isa, int32_t format, int32_t rows, const char **kernel);

/* ---- machine --------------------------------------------------------------------------------- */

/* Writes a JSON description of the machine (CPU, NUMA nodes and their CPUs, affinity, huge pages,
 * CUDA run time) into `buffer` with a terminating zero. `*needed` is the size that holds all of it,
 * terminator included; KTK_ERR_ARGUMENT when `capacity` is smaller. */
KTK_API ktk_status ktk_machine_json(char *buffer, size_t capacity, size_t *needed);

/* ---- worker pool ----------------------------------------------------------------------------- */

typedef struct ktk_pool ktk_pool;

typedef struct ktk_pool_config {
  uint32_t struct_size;
  int32_t subpool_count;               /* 1 .. number of NUMA nodes with CPUs, or more on one node */
  const int32_t *subpool_numa_map;     /* [subpool_count] node ids; NULL: the first that have CPUs */
  const int32_t *subpool_thread_count; /* [subpool_count] threads, each at least 1 */
  int32_t bind_threads;                /* non-zero: bind each worker to one CPU where there are enough */
  int64_t spin_ns;                     /* idle spinning before a worker parks; negative: the default */
} ktk_pool_config;

KTK_API ktk_status ktk_pool_create(const ktk_pool_config *config, ktk_pool **pool);
/* Waits for running work, then frees. Layers and queues of the pool must be gone: KTK_ERR_STATE. */
KTK_API ktk_status ktk_pool_destroy(ktk_pool *pool);
KTK_API ktk_status ktk_pool_threads(const ktk_pool *pool, int32_t *subpool_count, int32_t *thread_count);
/* What creation had to give up (threads beyond the CPUs, binding refused), one line each; "" if
 * nothing. The text lives as long as the pool. */
KTK_API const char *ktk_pool_warnings(const ktk_pool *pool);

/* Most threads of each pool of the process that take part in its work, from its next parallel section on;
 * the others sleep. Results do not depend on it. The threads are spread over the subpools, at least one
 * each; with fewer than subpools the calling thread works alone. 0 lifts the limit, and so does a number
 * that neither the usable CPUs nor the threads of any pool so far exceed. */
KTK_API ktk_status ktk_set_num_threads(int32_t num_threads);
/* The limit; where there is none, the usable CPUs or the threads of the largest pool so far, whichever is
 * more. Setting what was read restores it. */
KTK_API ktk_status ktk_get_num_threads(int32_t *num_threads);

/* ---- mixture-of-experts layer ---------------------------------------------------------------- */

typedef struct ktk_moe ktk_moe;

typedef struct ktk_moe_config {
  uint32_t struct_size;
  int32_t layer_index;       /* for messages and traces only */
  int32_t num_experts;       /* experts of the layer, E */
  int32_t top_k;             /* most experts a token may have, at most num_experts */
  int32_t hidden_size;       /* H */
  int32_t intermediate_size; /* I */
  int32_t max_tokens;        /* most tokens in one forward */
  int32_t format;            /* ktk_format */
  int32_t group_size;        /* INT8, INT4: groups of 32, 64 or 128 input columns, INT8 also of 256 or 512; 0:
                                one scale a row and no groups; FP8: 128; else 0 */
  int32_t strict;            /* non-zero: one kernel family, so bits do not depend on the batch size */
  float swiglu_limit;        /* > 0: gate at most limit, up within +-limit, before the activation */
  float swiglu_alpha;        /* > 0: gate * sigmoid(alpha * gate) * (up + 1) in place of silu(gate) * up */
  const char *isa;           /* NULL: ktk_isa_default() */
  const uint8_t *gpu_experts_mask; /* kept, [num_experts], read at each forward: non-zero experts
                                      contribute nothing here; NULL: none */
  int32_t rotated; /* INT8, INT4: non-zero: input columns of all projections are rotated before they are
                      quantised, as docs/numerics.md defines */
} ktk_moe_config;

/* One expert in row-major order: gate and up [I, H], down [H, I], all of one dtype, aligned to it.
 * Biases are fp32 [I], [I], [H]; each may be NULL. KTK_DTYPE_F8_E4M3 is taken by KTK_FORMAT_FP8 alone, as it
 * is, with a scale for each block of 128 by 128 weights: [ceil(I / 128), ceil(H / 128)] for gate and up,
 * [ceil(H / 128), ceil(I / 128)] for down. Other dtypes come without scales. */
typedef struct ktk_expert_weights {
  uint32_t struct_size;
  int32_t dtype; /* ktk_dtype */
  const void *gate;
  const void *up;
  const void *down;
  const float *gate_bias;
  const float *up_bias;
  const float *down_bias;
  const float *gate_scale;
  const float *up_scale;
  const float *down_scale;
} ktk_expert_weights;

typedef struct ktk_forward_args {
  uint32_t struct_size;
  int32_t top_k;               /* columns of expert_ids, at most the layer's top_k */
  const int32_t *num_tokens;   /* [1], read when the forward runs; 0 is allowed */
  const int64_t *expert_ids;   /* [num_tokens, top_k]; outside 0 .. E-1: contributes nothing */
  const float *expert_weights; /* [num_tokens, top_k] */
  const void *input;           /* [num_tokens, H] */
  void *output;                /* [num_tokens, H] */
  int32_t input_dtype;         /* ktk_dtype */
  int32_t output_dtype;        /* ktk_dtype */
  int32_t incremental;         /* non-zero: add to what `output` holds */
} ktk_forward_args;

/* The pool is kept. */
KTK_API ktk_status ktk_moe_create(const ktk_moe_config *config, ktk_pool *pool, ktk_moe **moe);
/* Waits until nothing of the layer is pending, then frees it. Replays of a CUDA graph that captured
 * it fail from then on, with the failure kept by the queue. */
KTK_API ktk_status ktk_moe_destroy(ktk_moe *moe);
/* Quantises and packs one expert; call once for each expert, in any order, from one thread at a time.
 * Weights that are not finite: KTK_ERR_ARGUMENT, and the expert counts as not loaded. */
KTK_API ktk_status ktk_moe_pack_expert(ktk_moe *moe, int32_t expert, const ktk_expert_weights *weights);
/* Size of one part of one packed expert, independent of the pool; 0 where the format has no such part
 * (a bias part is always [rows] fp32). */
KTK_API ktk_status ktk_moe_part_bytes(const ktk_moe *moe, int32_t part, size_t *bytes);
/* Copies a part out; a bias that was never set reads as zeros. */
KTK_API ktk_status ktk_moe_export_part(const ktk_moe *moe, int32_t expert, int32_t part, void *buffer,
                                       size_t bytes);
/* Copies a part in. Scales and biases that are not finite: KTK_ERR_ARGUMENT. The expert is loaded when
 * both weight parts and the scale and factor parts of the format are in. */
KTK_API ktk_status ktk_moe_import_part(ktk_moe *moe, int32_t expert, int32_t part, const void *buffer,
                                       size_t bytes);
/* Bytes of packed weights the layer holds, all experts and shards. */
KTK_API ktk_status ktk_moe_weight_bytes(const ktk_moe *moe, size_t *bytes);
KTK_API ktk_status ktk_moe_isa(const ktk_moe *moe, const char **name);
/* Runs one batch on the pool and the calling thread; returns when `output` is written. Experts that
 * are routed to, not masked and not loaded: KTK_ERR_STATE. */
KTK_API ktk_status ktk_moe_forward(ktk_moe *moe, const ktk_forward_args *args);

/* The weights that one packed expert stands for, dequantised to fp32, row-major: gate and up [I, H], down
 * [H, I]; each may be NULL. */
KTK_API ktk_status ktk_moe_unpack_expert(const ktk_moe *moe, int32_t expert, float *gate, float *up,
                                         float *down);

/* ---- fine-tuning ----------------------------------------------------------------------------- */

/* A layer with adapters and a way back. docs/numerics.md has the formulas. */
typedef struct ktk_sft ktk_sft;
/* One forward and the state that its backward needs. Any number may be live, in any order. */
typedef struct ktk_sft_context ktk_sft_context;

typedef enum ktk_policy {
  KTK_POLICY_NONE = 0,     /* no backward will follow */
  KTK_POLICY_SAVE = 1,     /* keep the input, gate and up in bf16 */
  KTK_POLICY_RECOMPUTE = 2 /* keep the routing tables, and run the forward again */
} ktk_policy;

typedef struct ktk_sft_config {
  uint32_t struct_size;
  int32_t lora_rank;  /* r, 0 to 256; 0: no adapters */
  float lora_scale;   /* factor of the adapters' products, alpha / r */
  float lora_dropout; /* share of elements of the adapters' inputs that is dropped, 0 <= p < 1 */
  int32_t skip_lora;  /* non-zero: adapters are neither added nor differentiated */
} ktk_sft_config;

/* The adapters of all experts, row-major, fp32 or bf16, aligned to it: gate and up A [E, r, H] and
 * B [E, I, r], down A [E, r, I] and B [E, H, r]. */
typedef struct ktk_lora_tensors {
  uint32_t struct_size;
  int32_t dtype; /* ktk_dtype, not fp16 */
  const void *gate_a;
  const void *gate_b;
  const void *up_a;
  const void *up_b;
  const void *down_a;
  const void *down_b;
} ktk_lora_tensors;

typedef struct ktk_sft_context_config {
  uint32_t struct_size;
  int32_t policy;  /* ktk_policy */
  int32_t dropout; /* non-zero: elements are dropped, by `seed`; zero: none, as in evaluation */
  int64_t seed;
} ktk_sft_context_config;

/* A gradient that is NULL is not computed; with `accumulate` those of weights are added to. Weights of
 * experts without tokens have a gradient of zero. */
typedef struct ktk_backward_args {
  uint32_t struct_size;
  int32_t grad_output_dtype;
  const void *grad_output; /* [num_tokens, H] of the context's forward */
  void *grad_input;        /* [num_tokens, H] */
  int32_t grad_input_dtype;
  int32_t lora_dtype;         /* of the next six, which have the shapes of ktk_lora_tensors; not fp16 */
  float *grad_expert_weights; /* [num_tokens, top_k]; 0 where nothing was contributed */
  void *gate_a;
  void *gate_b;
  void *up_a;
  void *up_b;
  void *down_a;
  void *down_b;
  int32_t base_dtype; /* of the next three; not fp16 */
  int32_t accumulate;
  void *gate; /* [E, I, H], format bf16 only */
  void *up;   /* [E, I, H] */
  void *down; /* [E, H, I] */
} ktk_backward_args;

/* The layer is kept; when it is destroyed, calls on the handle fail with KTK_ERR_STATE. */
KTK_API ktk_status ktk_sft_create(const ktk_sft_config *config, ktk_moe *moe, ktk_sft **sft);
/* Its contexts can only be destroyed from then on. */
KTK_API ktk_status ktk_sft_destroy(ktk_sft *sft);
/* The tensors are kept and read in place by each forward and backward, and nothing made of them outlives the
   call. Where they change between a forward and its backward, the backward goes by what they hold then.
   KTK_ERR_ARGUMENT, and those before stay, if one holds NaN or infinity. */
KTK_API ktk_status ktk_sft_set_lora(ktk_sft *sft, const ktk_lora_tensors *tensors);
KTK_API ktk_status ktk_sft_context_create(ktk_sft *sft, const ktk_sft_context_config *config,
                                          ktk_sft_context **context);
/* Waits for its forward or backward, then frees. */
KTK_API ktk_status ktk_sft_context_destroy(ktk_sft_context *context);
/* Tokens of the context's forward, and bytes that it holds for the backward: `activation_bytes` of input,
 * gate and up, `table_bytes` of routing tables. KTK_ERR_STATE before the forward. */
KTK_API ktk_status ktk_sft_context_size(const ktk_sft_context *context, int32_t *num_tokens,
                                        size_t *activation_bytes, size_t *table_bytes);
/* The forward of a new context, with the adapters. Inputs fp32 or bf16; with KTK_POLICY_RECOMPUTE `input`
 * is kept, unchanged, until the backward. */
KTK_API ktk_status ktk_sft_forward(ktk_sft_context *context, const ktk_forward_args *args);
/* Once for each context whose forward is done and whose policy allows it; else KTK_ERR_STATE. A gradient of
 * the output that holds NaN or infinity is KTK_ERR_ARGUMENT, and the context can still be used. */
KTK_API ktk_status ktk_sft_backward(ktk_sft_context *context, const ktk_backward_args *args);

/* ---- task queue ------------------------------------------------------------------------------ */

typedef struct ktk_queue ktk_queue;
/* A task of the caller; a non-zero return is a failure, kept and raised by the next sync. */
typedef int32_t (*ktk_task_fn)(void *context);

/* One thread that runs tasks in the order of submission. The pool is kept. */
KTK_API ktk_status ktk_queue_create(ktk_pool *pool, ktk_queue **queue);
/* Runs what is pending, then frees. */
KTK_API ktk_status ktk_queue_destroy(ktk_queue *queue);
KTK_API ktk_status ktk_queue_submit(ktk_queue *queue, ktk_task_fn function, void *context);
/* Submits a forward; `args` is copied, the buffers it names are used when it runs. A failure fills
 * the output with NaN and is raised by the next sync. */
KTK_API ktk_status ktk_queue_submit_forward(ktk_queue *queue, ktk_moe *moe, const ktk_forward_args *args);
/* The same for the two halves of a context. */
KTK_API ktk_status ktk_queue_submit_sft_forward(ktk_queue *queue, ktk_sft_context *context,
                                                const ktk_forward_args *args);
KTK_API ktk_status ktk_queue_submit_sft_backward(ktk_queue *queue, ktk_sft_context *context,
                                                 const ktk_backward_args *args);
/* Waits until at most `allow_n_pending` tasks are left; raises the first failure since the last sync. */
KTK_API ktk_status ktk_queue_sync(ktk_queue *queue, int32_t allow_n_pending);
/* The same in the order of a CUDA stream (a cudaStream_t as an integer), capturable in a CUDA graph.
 * Stream 0 without a CUDA run time means host order. */
KTK_API ktk_status ktk_queue_submit_forward_with_cuda_stream(ktk_queue *queue, uintptr_t stream, ktk_moe *moe,
                                                             const ktk_forward_args *args);
KTK_API ktk_status ktk_queue_submit_with_cuda_stream(ktk_queue *queue, uintptr_t stream, ktk_task_fn function,
                                                     void *context);
KTK_API ktk_status ktk_queue_sync_with_cuda_stream(ktk_queue *queue, uintptr_t stream,
                                                   int32_t allow_n_pending);
/* Tasks submitted and not yet finished. */
KTK_API ktk_status ktk_queue_pending(const ktk_queue *queue, int64_t *pending);

/* ---- trace ----------------------------------------------------------------------------------- */

/* What the threads of all pools and queues of the process did between start and stop. Several may run at
 * a time. In the child of a fork a trace of the parent is empty. */
typedef struct ktk_trace ktk_trace;

/* Each thread keeps at least its latest `spans_per_thread` spans, 1 to 2^24 - 1; 0: 65535. A worker's part
 * of one parallel section is one span of 40 bytes. */
KTK_API ktk_status ktk_trace_start(int64_t spans_per_thread, ktk_trace **trace);
/* Ends the recording; again: does nothing. */
KTK_API ktk_status ktk_trace_stop(ktk_trace *trace);
/* Writes a stopped trace as JSON for Chrome's trace viewer or Perfetto into `buffer`, as
 * ktk_machine_json does. KTK_ERR_STATE while it runs. */
KTK_API ktk_status ktk_trace_json(const ktk_trace *trace, char *buffer, size_t capacity, size_t *needed);
/* The same into a file, which appears when it is complete. */
KTK_API ktk_status ktk_trace_write(const ktk_trace *trace, const char *path);
/* Stops and frees. */
KTK_API ktk_status ktk_trace_destroy(ktk_trace *trace);

/* ---- probes ---------------------------------------------------------------------------------- */

/* What the machine can do at most on the threads of a pool: the rates that a layer is measured against. */
typedef struct ktk_probe ktk_probe;

typedef enum ktk_probe_kind {
  KTK_PROBE_PRODUCT = 0, /* multiplications of a weight format, operands in registers; work in operations */
  KTK_PROBE_READ = 1,    /* loads over large pages; work in bytes read */
  KTK_PROBE_COPY = 2     /* work in bytes read plus bytes written */
} ktk_probe_kind;

typedef struct ktk_probe_config {
  uint32_t struct_size;
  int32_t kind;    /* ktk_probe_kind */
  int32_t format;  /* PRODUCT: ktk_format; else 0 */
  const char *isa; /* NULL: ktk_isa_default() */
  size_t bytes;    /* READ, COPY: memory to read, rounded up to whole chunks of 2 MiB for each thread; it
                      has to be several times the last-level cache. PRODUCT: 0 */
} ktk_probe_config;

/* The pool is kept. */
KTK_API ktk_status ktk_probe_create(const ktk_probe_config *config, ktk_pool *pool, ktk_probe **probe);
KTK_API ktk_status ktk_probe_destroy(ktk_probe *probe);
/* Ways to do the same work. The machine's rate is that of the fastest. */
KTK_API ktk_status ktk_probe_variants(const ktk_probe *probe, int32_t *count);
/* The name lives as long as the probe. */
KTK_API ktk_status ktk_probe_variant_name(const ktk_probe *probe, int32_t variant, const char **name);
/* Runs a variant on all threads of the pool. PRODUCT: each thread makes `repeats` (rounded up to a multiple
 * of 8) rounds of its loop; READ, COPY: all memory is gone through `repeats` times. `*work` is in
 * operations, a multiplication and an addition being two, or in bytes. */
KTK_API ktk_status ktk_probe_run(ktk_probe *probe, int32_t variant, int64_t repeats, double *work,
                                 double *seconds);

#ifdef __cplusplus
}
#endif

#endif /* KTK_H */
