/* The far end of a benchmark's link: notes when the first record of a new block came in for each UDP port.
 *
 *   stamp  XDP, native: frames that are IPv4 without options, UDP from SOURCE_PORT, with a whole record, and
 *          drops them, also those of a block's later life; passes all else
 *
 * The clock is read for the first frame of a record, for one of each CLOCK_EACH that come on this CPU, and for those that
 * the reader wants exact; others get the latest reading, and are early by less than CLOCK_EACH frames. Between two ends
 * on one machine this runs on the sender's CPU, and reading a clock waits for all that is under way: done with each
 * frame, it took a fifth of the frame's whole way.
 *
 * What the record says itself is kept beside the stamp, so that each delivery can be told from the frame alone. Python
 * maps the array, reads and clears it between two publications. A port's frames come on one CPU at a time.
 */
#include <uapi/linux/bpf.h>

#include "arrivals.h"

BPF_F_TABLE("array", u32, struct arrival, arrivals, PORTS, BPF_F_MMAPABLE);

BPF_PERCPU_ARRAY(readings, struct reading, 1);

static __always_inline u64 now(u64 sequence, u8 exact)
{
    u32 zero = 0;
    struct reading *reading = readings.lookup(&zero);
    if (CLOCK_EACH == 1 || !reading)
        return bpf_ktime_get_ns();
    if (reading->frames++ % CLOCK_EACH == 0 || exact || reading->sequence != sequence) {
        reading->sequence = sequence;
        reading->now_ns = bpf_ktime_get_ns();
    }
    return reading->now_ns;
}

int stamp(struct xdp_md *ctx)
{
    u8 *frame = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
    if (frame + HEADERS + RECORD > end)
        return XDP_PASS;
    if (*(u16 *)(frame + 12) != htons(0x0800) || frame[14] != 0x45 || frame[23] != UDP)
        return XDP_PASS;
    if (*(u16 *)(frame + 34) != htons(SOURCE_PORT))
        return XDP_PASS;
    u32 port = ntohs(*(u16 *)(frame + 36));
    struct arrival *arrival = arrivals.lookup(&port);
    if (!arrival)
        return XDP_PASS;
    u8 *record = frame + HEADERS;
    if (record[EVENT] != PROVEN)
        return XDP_DROP;
    arrival->frames += 1;
    if (!arrival->at_ns) {
        /* In halves: the headers leave the record aligned to two bytes. */
        __builtin_memcpy(&arrival->sequence, record + SEQUENCE, 8);
        __builtin_memcpy(&arrival->seen_ns, record + SEEN, 8);
        arrival->source = record[SOURCE];
        asm volatile("" : : : "memory"); /* who sees the stamp sees the rest */
        arrival->at_ns = now(arrival->sequence, arrival->exact);
    }
    return XDP_DROP;
}
