/* What fanout.c and its Python face share: constants and structs, this being their only copy (see common.h for what
 * xdp/loader.py understands). All memory here is mapped by Python; who writes what is said with each struct.
 */
#ifndef SPRINT_EGRESS_H
#define SPRINT_EGRESS_H

#define SUBSCRIBERS 65536 /* at most at a time */
#define ENTRIES 69632     /* as many, and some that may still be under the eyes of a run that began before a change */
#define SNAPSHOTS 8       /* of the order: at most RUNS are held by runs, at least one is free to be written */
#define RUNS 6            /* that can go on at the same time: senders × CPUs */
#define RUN_CPUS 2        /* runs of one sender */
#define INTERFACES 64     /* that subscribers are reached by */
#define FRAMES_A_BATCH 64 /* the NAPI budget: with more, a veth's ring of 256 overflows now and then */
#define PAYLOAD_LIMIT 256
#define LOSSES 64         /* stretches of a run that are noted for being sent again */
#define RECORD_SIZE 192   /* of most payloads: docs/wire-format.md */

#define IPV4_HEADERS 42 /* Ethernet, IPv4, UDP */
#define IPV6_HEADERS 62
#define ENTRY_HEADERS 48 /* of them, so many stand in the entry, and the rest apart */

/* One frame's destination: one cache line, for a run reads thousands that have left the nearest caches meanwhile.
 * Written by the table's owner alone, and only while no order names it; afterwards nothing but `active`, and
 * `headers[0]` as one store. The table has twice ENTRIES: what headers of IPv6 have beyond ENTRY_HEADERS begins
 * `headers` of the element that stands ENTRIES further on, which is never active. */
struct subscriber {
    u32 active;
    u8 size; /* IPV4_HEADERS or IPV6_HEADERS */
    u8 zero;
    u16 device; /* in the DEVMAP */
    u32 ip_sum;  /* of 16-bit words as they stand in memory: IPv4's header without its length, */
    u32 udp_sum; /* and what UDP's checksum covers, without both lengths and the payload */
    u64 headers[6]; /* lengths and checksums zero */
};

/* How many of an order are visited. Written by the table's owner before it makes the snapshot the current one. */
struct snapshot {
    u64 version; /* its place among the snapshots is this modulo SNAPSHOTS */
    u32 first;   /* subscribers of the first rank, who stand in front */
    u32 count;
    u32 with_ipv6; /* 1: some are reached by IPv6 */
    u32 interfaces; /* by so many they are reached */
    u32 zero[10];
};

/* The table's owner's words to the senders. */
struct directory {
    u64 version;     /* of the current snapshot */
    u64 gap_ps;      /* pacing: least time from frame to frame, picoseconds; 0: as fast as it goes */
    u32 burst;       /* frames without a pause */
    u32 proofs;      /* counts up when interfaces have been proven: who has stepped down may try again */
    u32 narrow;      /* 1: an interface has one queue only, where two CPUs would overrun each other */
    u32 changes;     /* counts up when a link has changed: who waits before he tries again need wait no longer */
    u32 zero[8];
};

/* One run. The first line is its sender's, the second the kernel's. */
struct run {
    u64 pinned;  /* version of the snapshot that is being visited, 0: none */
    u32 place;   /* in the orders, of the first to visit, */
    u32 stride;  /* and from one to the next */
    u32 count;   /* of frames */
    u32 first;   /* of them, of the first rank */
    u32 length;  /* of the payload */
    u32 payload_sum;
    u32 direct; /* 1 + an entry that is visited instead, each time; 0: the order's */
    u32 step;   /* 1 + that of the ladder, for others to read; 0: nobody sends by this run */
    u32 frame; /* bytes of the frames that the run is given */
    u32 spare[5];

    u32 cursor; /* the next position */
    u32 skipped; /* inactive, or no order's */
    u32 attempted; /* redirected; what came of it: */
    u32 transmitted; /* taken by the driver */
    u32 dropped; /* refused by it */
    u32 zero;
    u64 began_ns; /* CLOCK_MONOTONIC: the first frame's turn, */
    u64 first_ended_ns; /* the first rank's last frame taken or refused, */
    u64 ended_ns; /* the last frame's; 0 for a run whose last turn never came */
    u64 idle[2];

    u8 payload[256];

    /* Where drivers refused frames, in the order of their turns: the places of the last of each stretch, and how many
     * they are. That is exact where one interface takes all of them, and nobody has left since the order was written. */
    u32 lost_end[64]; /* LOSSES */
    u32 lost_count[64];
    u32 losses; /* may be more than there is room for */
    u32 none[15];
};

/* One per CPU: frames on their way to a driver. They are there before the batch that they belong to ends, and softirqs
 * with it are let in: whatever else the tracepoint tells of finds nothing pending. */
struct flight {
    u32 run;
    u32 pending;
};

#endif
