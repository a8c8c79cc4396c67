/* What arrivals.c and its reader share: this is its only copy (see common.h for what xdp/loader.py understands). */
#ifndef SPRINT_ARRIVALS_H
#define SPRINT_ARRIVALS_H

#define PORTS 65536
#define UDP 17
#define HEADERS 42 /* Ethernet, IPv4, UDP */

/* Of the record, docs/wire-format.md: bytes, and where these begin. */
#define RECORD 192
#define SEQUENCE 16
#define EVENT 24
#define SOURCE 25
#define SEEN 176
#define PROVEN 1 /* the event that a block's first record tells */

/* Of one port. */
struct arrival {
    u64 at_ns;    /* CLOCK_MONOTONIC, the first frame; 0: none yet */
    u64 seen_ns;  /* what its record says */
    u64 sequence; /* likewise */
    u8 source;    /* likewise */
    u8 exact;     /* the reader's: 1, the clock is read for it */
    u16 zero;
    u32 frames;
};

/* Of one CPU. */
struct reading {
    u64 now_ns;
    u64 sequence; /* of the record that it was read for */
    u64 frames;
};

#endif
