/* A group of ranks in C: each process adds up what all contribute. Compile:
 *     cc allreduce.c -I../include -L<where libffreduce.so is> -lffreduce -o allreduce
 * Run one process per rank with RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT set. */
#include "ffreduce.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int number(const char *name, int otherwise) {
    const char *text = getenv(name);
    return text ? atoi(text) : otherwise;
}

static int complain(const char *what) {
    char text[1024];
    ffr_last_error(text, sizeof text);
    fprintf(stderr, "%s: %s\n", what, text);
    return 1;
}

static void count_calls(void *ctx, ffr_status status, const char *message) {
    if (status == FFR_OK && message[0] == '\0')
        ++*(int *)ctx;
}

int main(void) {
    ffr_config config;
    ffr_comm *comm;
    ffr_args args;
    ffr_op *op = NULL;
    ffr_stats stats;
    float data[1000];
    ffr_buf buf;
    int i, rank, size, calls = 0;

    if (ffr_abi_version() != FFR_ABI_VERSION)
        return 2;
    memset(&config, 0, sizeof config);
    config.struct_size = sizeof config;
    config.rank = rank = number("RANK", 0);
    config.size = size = number("WORLD_SIZE", 1);
    config.group_name = "c example";
    config.timeout_ms = 60000;
    if (ffr_comm_create(&config, &comm) != FFR_OK)
        return complain("ffr_comm_create");

    for (i = 0; i < 1000; i++)
        data[i] = (float)(rank + i);
    buf.ptr = data;
    buf.count = 1000;
    memset(&args, 0, sizeof args);
    args.struct_size = sizeof args;
    args.kind = FFR_ALLREDUCE;
    args.dtype = FFR_F32;
    args.redop = FFR_SUM;
    args.in = args.out = &buf;
    args.in_n = args.out_n = 1;
    args.flags = FFR_SUBMIT_WAIT_FOLLOWS;
    args.done = count_calls;
    args.done_ctx = &calls;
    if (ffr_submit(comm, &args, &op) != FFR_OK)
        return complain("ffr_submit");
    if (ffr_op_wait(op, -1) != FFR_OK)
        return complain("ffr_op_wait");
    if (ffr_op_sequence(op) != 1 || ffr_op_test(op) != FFR_OK || calls != 1)
        return 3;
    ffr_op_free(op);
    for (i = 0; i < 1000; i++)
        if (data[i] != (float)(size * i + size * (size - 1) / 2))
            return 4;

    /* What makes no sense is refused with a reason. */
    args.redop = FFR_BXOR;
    if (ffr_submit(comm, &args, &op) != FFR_ERR_UNSUPPORTED)
        return 5;

    memset(&args, 0, sizeof args);
    args.struct_size = sizeof args;
    args.kind = FFR_BARRIER;
    if (ffr_submit(comm, &args, &op) != FFR_OK || ffr_op_wait(op, 60000) != FFR_OK)
        return complain("barrier");
    ffr_op_free(op);

    stats.struct_size = sizeof stats;
    if (ffr_comm_stats(comm, &stats) != FFR_OK || stats.ops_completed != 2)
        return 6;
    printf("rank %d of %d: sum of element 1 is %g\n", rank, size, data[1]);
    ffr_comm_destroy(comm);
    return 0;
}
