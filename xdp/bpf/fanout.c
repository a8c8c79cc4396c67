/* Egress: one run of live frames (BPF_PROG_TEST_RUN, Linux 5.18) sends one UDP datagram to each subscriber.
 *
 *   fanout      XDP: makes the frame of the run's next subscriber and redirects it through the DEVMAP
 *   count_sent  raw tracepoint xdp_devmap_xmit: what drivers took of it, and what they refused
 *
 * The interface in a run's context tells which run it is, so several can go on at once: CONTEXT_0 to CONTEXT_5 are given
 * when compiling. The program is attached to an end of a parked link, which is none of them and where no packet ever
 * comes in: attached somewhere, it stays in the kernel's XDP dispatcher, and a run waits for no RCU grace period.
 *
 * The frame's memory comes back from the receiver as the receiver left it: every byte is written, headers and payload.
 * What is lost here: a frame that the driver refuses is gone, and told by the tracepoint alone; the call succeeds.
 * Interfaces that are down, gone, or without ndo_xdp_xmit take nothing, some without a word: redirected less taken is
 * what is missing.
 */
#include <uapi/linux/bpf.h>

#include "egress.h"

#define DEVICES_MISS 0 /* XDP_ABORTED: no interface of that number */
/* For the verifier, which wants the bounds of a size compared in 64 bits right before its use (see packet.h). */
#define FORGET(size) asm volatile("" : "+r"(size))
#define ONE ({ u64 one = 1; FORGET(one); one; }) /* before Linux 6.8 the verifier learns nothing from `!= 0` */

BPF_F_TABLE("array", u32, struct subscriber, subscribers, 2 * ENTRIES, BPF_F_MMAPABLE);
/* Entries by u32; two to an element, whose size the kernel rounds up to eight bytes. */
BPF_F_TABLE("array", u32, u64, orders, SNAPSHOTS * SUBSCRIBERS / 2, BPF_F_MMAPABLE);
BPF_F_TABLE("array", u32, struct snapshot, snapshots, SNAPSHOTS, BPF_F_MMAPABLE);
BPF_F_TABLE("array", u32, struct directory, directory, 1, BPF_F_MMAPABLE);
BPF_F_TABLE("array", u32, struct run, runs, RUNS, BPF_F_MMAPABLE);
BPF_PERCPU_ARRAY(flights, struct flight, 1);
BPF_DEVMAP(devices, INTERFACES);

static __always_inline u16 checksum(u32 sum)
{
    sum = (sum & 0xffff) + (sum >> 16);
    sum = (sum & 0xffff) + (sum >> 16);
    return ~sum;
}

static __always_inline u16 udp_checksum(u32 sum)
{
    u16 check = checksum(sum);
    return check ? check : 0xffff; /* zero would mean that there is none (RFC 768) */
}

/* The frame's headers, and room for the payload; its offset, 0 where that can't be. `entry` is `to`'s number. */
static __always_inline u32 write_headers(struct xdp_md *ctx, struct subscriber *to, u32 entry, struct run *run,
                                         u32 length)
{
    u32 offset = to->size == IPV6_HEADERS ? IPV6_HEADERS : IPV4_HEADERS;
    int surplus = (int)run->frame - (int)(offset + length);
    if (surplus && bpf_xdp_adjust_tail(ctx, -surplus))
        return 0;
    u8 *frame = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
    u64 *words = (u64 *)frame;
    u16 udp_length = htons(8 + length);
    u32 udp_sum = to->udp_sum + run->payload_sum + udp_length + udp_length;
    if (offset == IPV4_HEADERS) {
        if (frame + IPV4_HEADERS > end)
            return 0;
        u16 total = htons(28 + length);
        for (int i = 0; i < 5; i++)
            words[i] = to->headers[i];
        *(u16 *)(frame + 40) = udp_checksum(udp_sum);
        *(u16 *)(frame + 38) = udp_length;
        *(u16 *)(frame + 24) = checksum(to->ip_sum + total);
        *(u16 *)(frame + 16) = total;
    } else {
        u32 further = entry + ENTRIES;
        struct subscriber *rest = subscribers.lookup(&further);
        if (!rest || frame + IPV6_HEADERS > end)
            return 0;
        for (int i = 0; i < ENTRY_HEADERS / 8; i++)
            words[i] = to->headers[i];
        words[ENTRY_HEADERS / 8] = rest->headers[0];
        *(u32 *)(frame + 56) = *(u32 *)&rest->headers[1];
        *(u16 *)(frame + 60) = udp_checksum(udp_sum);
        *(u16 *)(frame + 58) = udp_length;
        *(u16 *)(frame + 18) = udp_length;
    }
    return offset;
}

/* The payload behind them; false where that can't be. The helper takes 14 ns longer for a record than these words. */
static __always_inline bool write_payload(struct xdp_md *ctx, u32 offset, struct run *run, u64 length)
{
    FORGET(length);
    if (length != RECORD_SIZE)
        return length >= ONE && length <= PAYLOAD_LIMIT && !bpf_xdp_store_bytes(ctx, offset, run->payload, length);
    u8 *to = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
    to += offset == IPV6_HEADERS ? IPV6_HEADERS : IPV4_HEADERS;
    if (to + RECORD_SIZE > end)
        return false;
    u64 *words = (u64 *)to, *from = (u64 *)run->payload;
#pragma unroll
    for (int i = 0; i < RECORD_SIZE / 8; i++)
        words[i] = from[i];
    return true;
}

/* Which entry has its turn at this position of the run, or ENTRIES, which is never active. */
static __always_inline u32 turn(struct run *run, u32 at)
{
    if (run->direct)
        return run->direct - 1;
    u32 place = run->place + at * run->stride, pair = place >> 1;
    u64 *entries = orders.lookup(&pair);
    return entries ? ((u32 *)entries)[place & 1] : ENTRIES;
}

/* RUNS where it is none: a packet that came in. */
static __always_inline u32 run_number(u32 ifindex)
{
    switch (ifindex) {
    case CONTEXT_0:
        return 0;
    case CONTEXT_1:
        return 1;
    case CONTEXT_2:
        return 2;
    case CONTEXT_3:
        return 3;
    case CONTEXT_4:
        return 4;
    case CONTEXT_5:
        return 5;
    default:
        return RUNS;
    }
}

int fanout(struct xdp_md *ctx)
{
    u32 number = run_number(ctx->ingress_ifindex), zero = 0;
    struct run *run = runs.lookup(&number);
    struct flight *flight = flights.lookup(&zero);
    if (!run || !flight)
        return XDP_DROP;
    u32 at = run->cursor;
    if (at >= run->count)
        return XDP_DROP;
    run->cursor = at + 1;
    if (at == 0)
        run->began_ns = bpf_ktime_get_ns();
    if (at % FRAMES_A_BATCH == 0)
        flight->pending = 0;
    u32 entry = turn(run, at), offset;
    u64 length = run->length;
    struct subscriber *to = subscribers.lookup(&entry);
    if (!to || !to->active)
        goto skip;
    offset = write_headers(ctx, to, entry, run, length);
    if (!offset || !write_payload(ctx, offset, run, length))
        goto skip;
    run->attempted += 1;
    if (devices.redirect_map(to->device, DEVICES_MISS) != XDP_REDIRECT)
        return XDP_DROP;
    flight->run = number;
    flight->pending += 1;
    return XDP_REDIRECT;
skip:
    run->skipped += 1;
    return XDP_DROP;
}

/* Frames that a driver has refused: `count` of them, up to the one before `end`. */
static __always_inline void note_loss(struct run *run, u32 end, u32 count)
{
    u32 n = run->losses, last = (n - 1) & (LOSSES - 1), next = n & (LOSSES - 1);
    if (n && n <= LOSSES && run->lost_end[last] == end - count) {
        run->lost_end[last] = end;
        run->lost_count[last] += count;
        return;
    }
    if (n < LOSSES) {
        run->lost_end[next] = end;
        run->lost_count[next] = count;
    }
    run->losses = n + 1;
}

int count_sent(struct bpf_raw_tracepoint_args *ctx)
{
    u32 zero = 0;
    struct flight *flight = flights.lookup(&zero);
    if (!flight || !flight->pending)
        return 0;
    u32 sent = ctx->args[2], dropped = ctx->args[3], number = flight->run;
    flight->pending -= sent + dropped < flight->pending ? sent + dropped : flight->pending;
    struct run *run = runs.lookup(&number);
    if (!run)
        return 0;
    run->transmitted += sent;
    run->dropped += dropped;
    if (dropped) /* what is still pending came after this bulk */
        note_loss(run, run->cursor - flight->pending, dropped);
    bool last = run->cursor >= run->count;
    bool first = !run->first_ended_ns && run->transmitted + run->dropped + run->skipped >= run->first;
    if (!last && !first) /* a clock that is read waits for all stores before it */
        return 0;
    u64 now = bpf_ktime_get_ns();
    if (last)
        run->ended_ns = now;
    if (first)
        run->first_ended_ns = now;
    return 0;
}
