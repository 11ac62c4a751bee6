/* ffreduce.h: the C ABI of firefly-reduce, asynchronous collectives on the CPU and the wire.
 *
 * Link with libffreduce.so (or .a). Plain C99, no other header of ours needed.
 *
 * The rules in short
 *   - Every rank of a group creates the same group (ffr_comm_create) and issues the same
 *     collectives in the same order. A difference is an error that names both sides, never a hang.
 *   - ffr_submit never blocks on a peer. It returns a handle; the operation runs on the group's
 *     progress thread, and on any thread that is inside ffr_op_wait.
 *   - The memory of an operation (every pointer in ffr_args.in and .out) belongs to the operation
 *     until it is complete. `ffr_args` and the two arrays of ffr_buf are copied by ffr_submit.
 *   - Every operation completes: with success, or with an error within the timeout.
 *   - After any error other than a cancelled receive (see FFR_OP_RECV) the group is broken: all
 *     its operations, pending and future, end with that error. Destroy it; make a new one (under
 *     a new group_name) in the same process if wanted.
 *   - All functions may be called from any thread, at the same time. Issue order is the order in
 *     which ffr_submit calls take their turn; threads that share a group must order themselves.
 *   - A forked child must not use a group of its parent: calls return FFR_ERR_INVALID, and
 *     ffr_comm_destroy / ffr_op_free only forget. The child keeps none of our sockets open.
 *   - No function throws or unwinds into C.
 */
#ifndef FFREDUCE_H
#define FFREDUCE_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* ABI version of this header. ffr_abi_version() of the library must be equal. Structs carry their
 * size, so fields can be added at their ends without a new version. */
#define FFR_ABI_VERSION 1u

typedef struct ffr_comm ffr_comm; /* one group, seen from one rank */
typedef struct ffr_op ffr_op;     /* one operation in flight or completed */

/* ---- status ------------------------------------------------------------------------------- */

typedef int32_t ffr_status;
enum {
    FFR_OK = 0,
    FFR_PENDING = 1,            /* not complete yet (ffr_op_test, ffr_op_wait with a time limit) */
    FFR_ERR_INTERNAL = -1,      /* a bug of ours */
    FFR_ERR_INVALID = -2,       /* arguments make no sense; nothing was submitted, group unharmed */
    FFR_ERR_UNAVAILABLE = -8,   /* the group could not be formed */
    FFR_ERR_TIMEOUT = -9,       /* the message names the missing ranks */
    FFR_ERR_CORRUPT = -12,      /* a peer sent or wrote what the protocol does not allow */
    FFR_ERR_MISMATCH = -22,     /* ranks issued different operations; the message names both */
    FFR_ERR_UNSUPPORTED = -20,  /* this dtype has no such reduction */
    FFR_ERR_ABORTED = -21,      /* ffr_comm_abort or ffr_comm_destroy ended it */
    FFR_ERR_PEER_DIED = -24     /* the message names the dead rank */
};

/* ---- enumerations (numbers are part of the ABI and of the wire format) ---------------------- */

typedef enum ffr_dtype {
    FFR_U8 = 0,
    FFR_I8 = 1,
    FFR_I16 = 2,
    FFR_I32 = 3,
    FFR_I64 = 4,
    FFR_U16 = 5,
    FFR_U32 = 6,
    FFR_U64 = 7,
    FFR_BOOL = 8, /* one byte, 0 or 1; SUM and MAX are OR, PRODUCT and MIN are AND */
    FFR_F16 = 9,
    FFR_BF16 = 10,
    FFR_F32 = 11,
    FFR_F64 = 12,
    FFR_COMPLEX64 = 13,  /* two f32 */
    FFR_COMPLEX128 = 14, /* two f64 */
    FFR_F8E4M3FN = 15,   /* overflow rounds to NaN, as in torch */
    FFR_F8E5M2 = 16      /* overflow rounds to infinity, as in torch */
} ffr_dtype;

/* f16, bf16 and fp8 accumulate in f32 and round once (nearest even). NaN wins in every floating
 * reduction, MIN and MAX included, and comes out as the canonical quiet NaN. Integers wrap.
 * AVG divides the sum by the group size once at the end (integers: toward zero).
 * PREMUL_SUM multiplies each rank's contribution by that rank's ffr_args.factor first.
 * MIN and MAX: not for complex. BAND, BOR, BXOR: integers and bool. AVG, PREMUL_SUM: not for bool. */
typedef enum ffr_redop {
    FFR_SUM = 0,
    FFR_AVG = 1,
    FFR_PRODUCT = 2,
    FFR_MIN = 3,
    FFR_MAX = 4,
    FFR_BAND = 5,
    FFR_BOR = 6,
    FFR_BXOR = 7,
    FFR_PREMUL_SUM = 8
} ffr_redop;

/* What each operation reads and writes. N is the group size, r the calling rank. "[c]" is one
 * buffer of c elements. "[N x c]" may be given as ONE buffer of N*c elements, block i for rank i,
 * or as N buffers of c elements, entry i for rank i (so torch's single and list forms both go
 * without a copy). In place: in and out may be the same memory where the table says so; a block
 * of in may also be exactly r's block of out for allgather, gather, scatter, reduce_scatter.
 * Every other overlap of in and out is an error of the caller.
 *
 *   operation            in                          out                         in place
 *   FFR_ALLREDUCE        [c]                         [c]                         in == out
 *   FFR_REDUCE           [c]                         root: [c], others: none     in == out
 *   FFR_BROADCAST        root: [c], others: none     others: [c]; root: none or  in == out
 *                                                    [c] (== in: nothing copied)
 *   FFR_ALLGATHER        [c]                         [N x c]
 *   FFR_REDUCE_SCATTER   [N x c]                     [c]
 *   FFR_ALLTOALL         [N x c] or N buffers of     [N x c] or N buffers of     no
 *                        any counts, 0 included      any counts
 *   FFR_GATHER           [c]                         root: [N x c], others none
 *   FFR_SCATTER          root: [N x c], others none  [c]
 *   FFR_SEND             [c]                         none                        peer, tag
 *   FFR_RECV             none                        [c]                         peer, tag
 *   FFR_RECV_ANY         none                        [c]                         tag; ffr_op_source
 *   FFR_BARRIER          none                        none
 *
 * REDUCE_SCATTER with N buffers: entry i may have its own count c_i (then out of rank r has c_r);
 * all ranks must agree on the counts. ALLGATHER with N buffers: likewise, out entry i has the
 * count of rank i's in. For uneven blocks in one contiguous buffer pass N ffr_bufs that point
 * into it. "Others: none" means in_n / out_n 0; buffers given where none is wanted are ignored.
 *
 * SEND and RECV match by (sender, receiver, tag) in issue order, apart from the collectives:
 * they may be issued before, between or after them, on either side. Counts and dtypes of a
 * matching pair must be equal in bytes. A RECV or RECV_ANY that times out before a matching
 * message came ends alone: the group stays whole. */
typedef enum ffr_op_kind {
    FFR_ALLREDUCE = 0,
    FFR_REDUCE = 1,
    FFR_BROADCAST = 2,
    FFR_ALLGATHER = 3,
    FFR_REDUCE_SCATTER = 4,
    FFR_ALLTOALL = 5,
    FFR_GATHER = 6,
    FFR_SCATTER = 7,
    FFR_SEND = 8,
    FFR_RECV = 9,
    FFR_RECV_ANY = 10,
    FFR_BARRIER = 11
} ffr_op_kind;

/* ---- the library ---------------------------------------------------------------------------- */

uint32_t ffr_abi_version(void);
const char *ffr_version(void); /* "0.1.0", static */

/* Size of one element in bytes; 0 for a number that is no dtype. */
size_t ffr_dtype_size(int32_t dtype);

/* Text of the last error returned by a function on this thread (ffr_comm_create, ffr_submit, ...).
 * Copies at most len bytes including the final NUL, always terminates if len > 0, and returns the
 * length of the whole text without the NUL. Errors of operations: ffr_op_error. */
size_t ffr_last_error(char *buf, size_t len);

/* ---- creating a group ------------------------------------------------------------------------ */

/* A key-value store that all ranks see, for bootstrap only (plug c10d::Store in here). Called only
 * on the thread inside ffr_comm_create, never after it has returned. Keys are short printable
 * ASCII without NUL and begin with "ffr/"; values are at most 64 KiB. */
typedef struct ffr_store {
    void *ctx;
    /* Publishes value under key. 0 for success, else an errno-like number. */
    int32_t (*set)(void *ctx, const char *key, const uint8_t *value, size_t len);
    /* Waits up to timeout_ms for key to be published, then copies its value to buf, at most cap
     * bytes, and sets *len to the value's whole length. 0 for success, ETIMEDOUT (110) when it did
     * not appear, else an errno-like number. Must not throw. */
    int32_t (*get)(void *ctx, const char *key, uint8_t *buf, size_t cap, size_t *len,
                   uint64_t timeout_ms);
} ffr_store;

/* Zero the struct, set struct_size = sizeof(ffr_config), rank, size; the rest may stay zero. */
typedef struct ffr_config {
    uint32_t struct_size;
    int32_t rank;               /* 0 .. size-1 */
    int32_t size;               /* 1 .. 4096 */
    uint32_t flags;             /* 0 */
    uint64_t timeout_ms;        /* of forming the group and, by default, of each operation; 0 = 600000 */
    const char *group_name;     /* the same on all ranks, unique among groups that share the store
                                   and the moment; NULL = "default" */
    const char *node_key;       /* ranks with equal keys share memory, others use the network;
                                   NULL = one of its own under $NCCL_SHM_DISABLE=1, else
                                   $FIREFLY_NODE_ID, else host name and boot id */
    const uint8_t *secret;      /* 32 bytes shared by the ranks; NULL = $FIREFLY_JOB_SECRET (64 hex
                                   digits), else rank 0 makes one and publishes it in the store */
    size_t secret_len;          /* 32, or 0 with NULL */
    const ffr_store *store;     /* NULL = built-in rendezvous at master_addr:master_port */
    const char *master_addr;    /* built-in rendezvous: rank 0 listens; NULL = $MASTER_ADDR, else
                                   127.0.0.1. Under torchrun the port is taken: plug the store in */
    uint16_t master_port;       /* 0 = $MASTER_PORT, else 29555 */
    uint16_t reserved0;
    uint32_t heartbeat_timeout_ms; /* silence of a remote peer's process that counts as death; 0 = 10000.
                                   Death itself is seen at once; this is for dead hosts and cut cables */
    const char *bind_address;   /* address that peers on other nodes reach this rank at; NULL =
                                   $FIREFLY_BIND_ADDR, else of the interface that
                                   $FIREFLY_SOCKET_IFNAME, $NCCL_SOCKET_IFNAME or
                                   $GLOO_SOCKET_IFNAME names, else the one that routes to
                                   master_addr */
    uint64_t form_timeout_ms;   /* of forming the group alone; 0 = timeout_ms */
} ffr_config;

/* Forms the group: collective over its ranks, blocks up to timeout_ms. On success *out is set and
 * a progress thread runs. A group of one needs no store. */
ffr_status ffr_comm_create(const ffr_config *config, ffr_comm **out);

/* Forms a group of some of comm's ranks through comm, without a store: collective over comm, whose
 * ranks that join no group pass ranks_n 0 and get *out NULL. Rank i of the new group is ranks[i] of
 * comm; all ranks of a new group pass the same name and list. Several disjoint groups may be formed by
 * one call on all ranks. Blocks up to timeout_ms (0 = 600000). The new group has comm's settings; it
 * lives, fails and is destroyed apart from comm. */
ffr_status ffr_comm_split(ffr_comm *comm, const char *name, const int32_t *ranks, size_t ranks_n,
                          uint64_t timeout_ms, ffr_comm **out);

int32_t ffr_comm_rank(const ffr_comm *comm);
int32_t ffr_comm_size(const ffr_comm *comm);

/* Sequence number of the last collective submitted; 0 before the first. Point-to-point operations
 * do not count. */
uint64_t ffr_comm_sequence(const ffr_comm *comm);

/* Default timeout of operations submitted from now on; 0 = keep. */
void ffr_comm_set_timeout(ffr_comm *comm, uint64_t timeout_ms);

/* FFR_OK while the group works, else the status that broke it; its text is put in buf as by
 * ffr_last_error (buf may be NULL with len 0). */
ffr_status ffr_comm_error(const ffr_comm *comm, char *buf, size_t len);

/* Breaks the group from this rank at once, without its peers' help: every pending operation ends
 * with FFR_ERR_ABORTED, every waiter wakes, and the memory of the operations is ours no more when
 * this returns. Peers see an error that names this rank. Any number of calls, from any thread.
 * reason: for the messages, may be NULL. The handle stays valid. */
void ffr_comm_abort(ffr_comm *comm, const char *reason);

/* Ends and frees the group; NULL is nothing. Operations still pending end with FFR_ERR_ABORTED,
 * so wait for them first; peers that still wait for this rank see an error that names it, peers
 * that do not see nothing. Joins the progress thread, hence must not be called from a callback.
 * Op handles stay valid until freed. No other call may use comm at the same time or after. */
void ffr_comm_destroy(ffr_comm *comm);

typedef struct ffr_stats {
    uint32_t struct_size;       /* set by the caller: sizeof(ffr_stats) */
    uint32_t reserved0;
    uint64_t ops_submitted;     /* all operations, point-to-point included */
    uint64_t ops_completed;     /* with success */
    uint64_t ops_failed;
    uint64_t shm_bytes_sent;    /* payload handed to ranks of this node through shared memory */
    uint64_t shm_bytes_received;
    uint64_t tcp_bytes_sent;    /* payload and headers through TCP */
    uint64_t tcp_bytes_received;
    uint64_t reduced_bytes;     /* input bytes that this rank's kernels have reduced */
    uint32_t local_peers;       /* ranks reached through shared memory */
    uint32_t remote_peers;      /* ranks reached through the network */
    uint64_t rdma_bytes_sent;   /* payload, headers and steering through RDMA devices */
    uint64_t rdma_bytes_received;
    uint64_t copied_bytes;      /* payload copied in user space between channels and operations */
    uint32_t rdma_peers;        /* of remote_peers, those reached by RDMA */
    uint32_t reserved1;
} ffr_stats;

/* Fills the first stats->struct_size bytes. */
ffr_status ffr_comm_stats(const ffr_comm *comm, ffr_stats *stats);

/* ---- operations ------------------------------------------------------------------------------ */

typedef struct ffr_buf {
    void *ptr;      /* aligned for the dtype; may be NULL when count is 0 */
    uint64_t count; /* elements */
} ffr_buf;

/* Called exactly once when the operation is complete, with no lock of ours held, on the progress
 * thread or on a thread that is inside ffr_op_wait, ffr_comm_abort or ffr_comm_destroy (of any
 * operation of the group). Never before ffr_submit has returned, unless FFR_SUBMIT_INLINE allows
 * it. The operation's memory is the caller's again. message is "" for success and lives until the
 * callback returns. The callback may submit operations; it must not wait for one, and must not
 * destroy the group. */
typedef void (*ffr_done_fn)(void *ctx, ffr_status status, const char *message);

enum {
    /* The callback may run inside ffr_submit, on the submitting thread (groups of one, small
     * operations whose peers came first). Saves a thread switch. */
    FFR_SUBMIT_INLINE = 1u << 0,
    /* The caller is about to call ffr_op_wait on this operation. The progress thread is not woken
     * for it, which saves a thread switch; without the wait the operation may stand still. */
    FFR_SUBMIT_WAIT_FOLLOWS = 1u << 1
};

/* Zero the struct, set struct_size = sizeof(ffr_args) and what the operation needs. */
typedef struct ffr_args {
    uint32_t struct_size;
    int32_t kind;         /* ffr_op_kind */
    int32_t dtype;        /* ffr_dtype */
    int32_t redop;        /* ffr_redop; reductions only */
    int32_t root;         /* reduce, broadcast, gather, scatter */
    int32_t peer;         /* send, recv */
    uint32_t tag;         /* send, recv, recv_any */
    uint32_t flags;       /* FFR_SUBMIT_* */
    double factor;        /* PREMUL_SUM */
    uint64_t timeout_ms;  /* 0 = the group's */
    const ffr_buf *in;
    size_t in_n;
    const ffr_buf *out;
    size_t out_n;
    ffr_done_fn done;     /* may be NULL */
    void *done_ctx;
} ffr_args;

/* Starts an operation. FFR_OK: *op is set (op may be NULL if the handle is not wanted) and `done`
 * will be called exactly once, also when the operation fails. Any other status: nothing was
 * submitted, `done` will not be called, ffr_last_error says why; in a broken group that is the
 * error that broke it. */
ffr_status ffr_submit(ffr_comm *comm, const ffr_args *args, ffr_op **op);

/* Waits for completion, driving the group's progress on this thread. timeout_ms < 0: as long as
 * the operation's own timeout lets it. Returns the operation's status, or FFR_PENDING when
 * timeout_ms ran out first (the operation goes on). When it returns a final status, `done` has
 * returned (unless this is called from inside a callback, which is not allowed). */
ffr_status ffr_op_wait(ffr_op *op, int64_t timeout_ms);

/* The operation's status, or FFR_PENDING. Tries a little progress; never blocks. */
ffr_status ffr_op_test(ffr_op *op);

/* Text of a failed operation's error ("" while pending and after success), as ffr_last_error. It
 * names this rank, the group, the sequence number, the operation and the missing or dead ranks. */
size_t ffr_op_error(const ffr_op *op, char *buf, size_t len);

/* Sequence number: collectives count 1, 2, 3, ... in issue order; 0 for point-to-point. */
uint64_t ffr_op_sequence(const ffr_op *op);

/* Sender of a completed RECV or RECV_ANY; -1 otherwise. */
int32_t ffr_op_source(const ffr_op *op);

/* Gives the handle back; NULL is nothing. A pending operation goes on and its memory stays in use
 * until `done` is called. */
void ffr_op_free(ffr_op *op);

#ifdef __cplusplus
}
#endif

#endif
