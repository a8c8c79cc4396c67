/* What the kernel side and Python share: constants and structs, this being their only copy.
 *
 * xdp/loader.py reads this file as text, so keep to what it understands: `#define NAME number`, and structs of one field
 * a line, whose type is u8, u16, u32, u64, an array of those, or an earlier struct. Numbers are in the machine's byte
 * order, addresses in the network's.
 */
#ifndef SPRINT_COMMON_H
#define SPRINT_COMMON_H

#define FLOWS 8192            /* directions of connections followed at once; a node has 125 connections unless told */
#define MESSAGES_A_SEGMENT 64 /* followed in one segment; what is behind them is captured for Python to frame */
#define UNPLACED_LIMIT 256    /* segments on end without a message header, until a flow counts as opaque, */
#define V1_UNPLACED_LIMIT 16384 /* and if it has been seen to speak v1: more than a whole message takes, on any link */
#define STAMPS 1024           /* segments on their way through the mirror; a power of two */
#define SEARCHED_BYTES 4096   /* of a segment that can't be placed: there the magic is looked for; a multiple of 8 */
#define EXPRESS_PAYLOAD 16384 /* captured of one segment at most: GRO hands on up to 64 KiB, per-CPU memory ends at 32 */
#define MIRROR_FRAME 3512     /* what the mirror link carries in one piece: links.MIRROR_MTU and Ethernet's 14 bytes */
#define XSKS 16
#define LONG_BODY 16384       /* a message of as much is remembered beyond its end: TCP may bring parts of it later */
#define PLACES 64             /* flows whose next bytes a CPU remembers to be of no interest; a power of two */
#define PLACE_BYTES 262144    /* so far at most, whatever a length says: then the flow is looked up again */

#define HEADER_SIZE 24 /* of a message: magic, command, length, checksum */
#define COMMAND_SIZE 12
#define MAX_MESSAGE 4000000 /* Bitcoin Core's MAX_PROTOCOL_MESSAGE_LENGTH */
#define MAX_HEADERS 162003  /* body of 2,000 headers */
#define MAX_INV 1800003     /* body of 50,000 inventory entries */
#define BLOCK_PREFIX 128    /* of the body of cmpctblock and block: the header, and what the transactions' count is in */

#define CAPTURED_ANNOUNCEMENT 1 /* an announcement starts in it */
#define CAPTURED_CONTINUED 2    /* an announcement that started earlier goes on in it */
#define CAPTURED_PARTIAL 4      /* it ends inside a message header */
#define CAPTURED_BEGINS 8       /* it begins with the magic */
#define CAPTURED_UNPLACED 16    /* where messages start in it is unknown */

#define MARK 0x5370726e /* in the XDP metadata: tc clones this packet */

#define FLOW_NEW 0    /* no message header seen yet */
#define FLOW_V1 1     /* has been seen to speak the v1 transport */
#define FLOW_OPAQUE 2 /* doesn't: the v2 transport (BIP324), or no Bitcoin at all */

/* Set by user space at any time, in a map that it has mapped. */
struct config {
    u32 magic;          /* the network's message start, as its four bytes stand in memory */
    u32 express;        /* 1: captured segments go into the ring buffer */
    u32 wakeup;         /* 1: the ring buffer wakes who sleeps on it; 0: BPF_RB_NO_WAKEUP */
    u32 mirror_ifindex; /* the mirror link's near end; 0: nothing is marked or cloned */
    u32 every_magic;    /* 1: capture every segment that begins with the magic; 0: only where no message was due */
    u32 epoch;          /* when it changes, CPUs forget what they remember of flows; the programs add to it too */
};

/* One per CPU. */
struct counters {
    u64 packets;       /* seen on the interface */
    u64 segments;      /* of them, with payload, of peer-to-peer flows */
    u64 announcements; /* message headers of announcements recognised */
    u64 captured;      /* segments chosen */
    u64 surplus;       /* of them, without any part of an announcement that is known as such */
    u64 express;       /* written to the ring buffer */
    u64 dropped;       /* not written: the ring buffer was full */
    u64 cut;           /* written, but longer than EXPRESS_PAYLOAD */
    u64 marked;        /* marked for tc */
    u64 unmarked;      /* not marked: this driver's packets have no room for XDP metadata */
    u64 cloned;        /* handed to the mirror link by tc */
    u64 uncloned;      /* refused by it */
    u64 shortened;     /* of those clones that GRO had joined: brought down to what is needed */
    u64 redirected;    /* handed to the AF_XDP socket */
    u64 unredirected;  /* dropped at the mirror link's far end: no socket there */
    u64 opaque_flows;  /* directions of connections whose messages can't be read */
};

/* IPv4 addresses mapped into IPv6 (RFC 4291); ports in the machine's byte order. */
struct flow_key {
    u8 source[16];
    u8 destination[16];
    u16 source_port;
    u16 destination_port;
};

/* A guess at where messages start in a flow. */
struct track {
    u32 next;      /* sequence number of the next byte of a message header */
    u32 last;      /* where the last header began */
    u32 want_from; /* of the announcement being captured; equal to want_to: none is */
    u32 want_to;
    u32 body_from; /* of the last long body, what nobody wants of it: there its retransmitted segments belong */
    u32 body_to;
    u8 valid;
    u8 have;   /* bytes of that header that came with earlier segments: in head */
    u8 proven; /* a message header was found by it; it is a guess by SYN until then */
    u8 zero;
    u8 head[24];
};

/* Two guesses, since anybody can put a packet with a magic on the wire: the one that has last found a message where it
 * expected one, and the newest other. */
struct flow {
    struct track tracks[2];
    u32 unplaced; /* on end */
    u8 state;
    u8 main;
    u16 zero;
};

/* What a CPU remembers of a flow: that segments in here are captured only if they begin with the magic. */
struct place {
    struct flow_key key;
    u32 from; /* sequence number */
    u32 size; /* bytes from there */
    u32 epoch; /* config's, when this was so */
};

/* A record of the ring buffer: this and `captured` bytes of payload. A segment is captured from the first byte that is
 * needed to the last; what the segment holds before that is `skipped`. */
struct express_entry {
    u64 arrival_ns; /* CLOCK_MONOTONIC */
    struct flow_key flow;
    u32 sequence; /* of the first byte captured */
    u32 length;   /* payload on the wire from that byte on */
    u32 captured;
    u32 skipped;
    u8 flags; /* of TCP, as on the wire */
    u8 reasons; /* CAPTURED_… */
    u16 zero;
};

/* In the metadata in front of a mirrored frame in the AF_XDP socket's memory; all zero but for `mark` where the frame
 * is no captured segment's first (what GRO had joined is cut up again on the mirror link). */
struct mirror_stamp {
    u64 arrival_ns;
    u32 skipped; /* bytes of payload before the first that is needed */
    u32 mark;    /* MARK */
};

#endif
