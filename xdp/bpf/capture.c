/* Ingest: finds announcements of blocks in peer-to-peer flows as their packets pass an interface.
 *
 *   classify     XDP on the interface: chooses segments; writes them to the ring buffer, marks them for tc
 *   mirror       tc ingress: clones marked packets to the mirror link
 *   classify_tc  tc ingress, where no XDP program can be: chooses segments itself, and clones them
 *   to_xsk       XDP on the mirror link's far end: into the AF_XDP socket
 *
 * The packet itself always goes on, untouched: classify returns XDP_PASS, the tc programs TC_ACT_UNSPEC (TCX_NEXT).
 *
 * What is lost here: IP fragments and tunnels aren't looked into; the ring buffer drops what finds it full; of a segment
 * EXPRESS_PAYLOAD bytes are captured, and in it MESSAGES_A_SEGMENT messages are followed. What is in doubt is captured,
 * exact framing is for user space. No checksum is verified, and nothing here is proof of anything: whoever can put a
 * packet on the wire can have it captured.
 *
 * Scratch memory in maps is there for the verifier as well: it forgets what it knew of a value that has been stored
 * there, and so doesn't walk the framing once for each way through the headers.
 */
#include <uapi/linux/bpf.h>
#include <uapi/linux/if_ether.h>
#include <uapi/linux/ip.h>
#include <uapi/linux/ipv6.h>
#include <uapi/linux/pkt_cls.h>
#include <uapi/linux/tcp.h>

#include "common.h"

#define TCP_PROTOCOL 6
#define VLAN_TAGS 2
/* The verifier wants the bounds of a size compared right before its use, in 64 bits: keeps the compiler from dropping a
 * comparison whose outcome it can prove itself. */
#define FORGET(size) asm volatile("" : "+r"(size))
#define UNKNOWN(field) (*(volatile typeof(field) *)&(field))
#define EXTENSION_HEADERS 6
#define MSG_WITNESS_FLAG 0x40000000
#define TCP_SYN 2
#define NONE 2
#define FOUR(a, b, c, d) ((u32)(a) | (u32)(b) << 8 | (u32)(c) << 16 | (u32)(d) << 24) /* as they lie in memory */

/* Room for a partial header and as much again: the verifier adds the most each may have. */
struct work {
    u32 start; /* of the TCP payload, from the frame's first byte */
    u32 length;
    u32 sequence;
    u32 offset;
    u32 from; /* what is captured of the payload */
    u32 to;
    u32 reasons;
    u32 announcements;
    u32 found; /* message headers, by the guess that is being followed */
    u32 lost;  /* there was none where one was due */
    u32 flags;
    u32 begins; /* with the magic */
    u32 fresh;  /* the guess that was made from this segment, or NONE */
    u32 placed;
    u32 header[12];
    struct flow_key key;
};

struct express_room {
    struct express_entry entry;
    u8 payload[EXPRESS_PAYLOAD];
};

struct stamp {
    struct flow_key key;
    u32 sequence;
    u32 skipped;
    u32 zero;
    u64 arrival_ns;
};

BPF_F_TABLE("array", u32, struct config, config, 1, BPF_F_MMAPABLE);
BPF_F_TABLE("array", u32, u64, ports, 1024, BPF_F_MMAPABLE); /* a bit for each port */
BPF_TABLE("lru_hash", struct flow_key, struct flow, flows, FLOWS);
BPF_PERCPU_ARRAY(counters, struct counters, 1);
BPF_PERCPU_ARRAY(works, struct work, 1);
BPF_PERCPU_ARRAY(rooms, struct express_room, 1);
BPF_ARRAY(stamps, struct stamp, STAMPS);
BPF_RINGBUF_OUTPUT(express, RING_PAGES);
BPF_XSKMAP(xsks, XSKS);

/* A packet as one of the two kinds of program sees it; `skb` is known when compiling. */
struct view {
    void *ctx;
    void *data;
    void *end;
    u32 size;
    int skb;
};

static __always_inline int load(struct view *v, u32 offset, void *to, u32 size)
{
    return v->skb ? bpf_skb_load_bytes(v->ctx, offset, to, size) : bpf_xdp_load_bytes(v->ctx, offset, to, size);
}

/* Part of a packet's headers, in place or (tc may see no more than a packet's first bytes in place) copied. */
static __always_inline void *peek(struct view *v, u32 offset, u32 size, void *copy)
{
    if (v->skb)
        return bpf_skb_load_bytes(v->ctx, offset, copy, size) ? 0 : copy;
    if (offset > 0xffff)
        return 0;
    void *at = v->data + offset;
    return at + size > v->end ? 0 : at;
}

static __always_inline int is_watched(u16 port)
{
    u32 word = port >> 6;
    u64 *bits = ports.lookup(&word);
    return bits && (*bits >> (port & 63) & 1);
}

/* The offset of the transport header of an IPv6 packet, 0 if it isn't TCP. */
static __always_inline u32 after_extension_headers(struct view *v, u32 offset, u8 next)
{
    u8 copy[4];
    for (int i = 0; i <= EXTENSION_HEADERS; i++) {
        if (next == TCP_PROTOCOL)
            return offset;
        u8 *header = peek(v, offset, 4, copy);
        if (!header)
            return 0;
        u32 size;
        if (next == 0 || next == 43 || next == 60 || next == 135) /* hop-by-hop, routing, destination, mobility */
            size = 8 + header[1] * 8;
        else if (next == 51) /* authentication (RFC 4302) */
            size = 8 + header[1] * 4;
        else if (next == 44 && header[2] == 0 && (header[3] & 0xf9) == 0) /* a fragment that is the whole packet */
            size = 8;
        else
            return 0;
        next = header[0];
        offset += size;
    }
    return 0;
}

/* Fills `w` with what the headers say; 0 where this is no TCP segment of a watched port, whole in this packet. */
static __always_inline int parse(struct view *v, struct work *w)
{
    u8 copy[40];
    u32 offset = 12, transport, end;
    u16 *type = peek(v, offset, 2, copy);
    if (!type)
        return 0;
    u16 protocol = ntohs(*type);
    for (int i = 0; i < VLAN_TAGS && (protocol == 0x8100 || protocol == 0x88a8); i++) {
        offset += 4;
        type = peek(v, offset, 2, copy);
        if (!type)
            return 0;
        protocol = ntohs(*type);
    }
    offset += 2;
    u32 network = offset;
    if (protocol == 0x0800) {
        struct iphdr *ip = peek(v, offset, 20, copy);
        if (!ip || ip->version != 4 || ip->ihl < 5 || ip->protocol != TCP_PROTOCOL || ip->frag_off & htons(0x3fff))
            return 0;
        /* GRO of more than 64 KiB (BIG TCP) leaves the length zero. */
        end = ip->tot_len ? offset + ntohs(ip->tot_len) : v->size;
        transport = offset + ip->ihl * 4;
    } else if (protocol == 0x86dd) {
        struct ipv6hdr *ip = peek(v, offset, 40, copy);
        if (!ip || ip->version != 6)
            return 0;
        end = ip->payload_len ? offset + 40 + ntohs(ip->payload_len) : v->size;
        transport = after_extension_headers(v, offset + 40, ip->nexthdr);
        if (!transport)
            return 0;
    } else {
        return 0;
    }
    struct tcphdr *tcp = peek(v, transport, 20, copy);
    if (!tcp)
        return 0;
    u16 source = ntohs(tcp->source), destination = ntohs(tcp->dest);
    if (!is_watched(source) && !is_watched(destination))
        return 0;
    u32 start = transport + tcp->doff * 4;
    if (tcp->doff < 5 || start > end || end > v->size)
        return 0;
    w->start = start;
    w->length = end - start;
    w->sequence = ntohl(tcp->seq);
    w->flags = ((u8 *)tcp)[13];
    if (w->flags & TCP_SYN)
        w->sequence += 1; /* SYN takes a number of its own, before the payload's */
    w->key.source_port = source;
    w->key.destination_port = destination;
    if (protocol == 0x0800) {
        u32 *addresses = peek(v, network + 12, 8, copy);
        if (!addresses)
            return 0;
        __builtin_memset(w->key.source, 0, 32);
        *(u16 *)(w->key.source + 10) = 0xffff;
        *(u16 *)(w->key.destination + 10) = 0xffff;
        *(u32 *)(w->key.source + 12) = addresses[0];
        *(u32 *)(w->key.destination + 12) = addresses[1];
    } else {
        u32 *addresses = peek(v, network + 8, 32, copy);
        if (!addresses)
            return 0;
        __builtin_memcpy(w->key.source, addresses, 32);
    }
    return 1;
}

static __always_inline void want(struct work *w, u32 from, u32 to, u32 reason)
{
    if (from < w->from)
        w->from = from;
    if (to > w->to)
        w->to = to;
    w->reasons |= reason;
}

/* Whether an inv's first entry is a block, or can't be seen in this segment. Bitcoin Core puts blocks before
 * transactions, others announce blocks in messages of their own. */
static __always_inline int first_is_block(struct view *v, struct work *w, u32 body)
{
    u8 count;
    u32 type;
    if (body >= w->length || load(v, w->start + body, &count, 1))
        return 1;
    u32 at = body + (count < 0xfd ? 1 : count == 0xfd ? 3 : count == 0xfe ? 5 : 9);
    if (at + 4 > w->length || load(v, w->start + at, &type, 4))
        return 1;
    type &= ~MSG_WITNESS_FLAG;
    return type >= 2 && type <= 4; /* MSG_BLOCK, MSG_FILTERED_BLOCK, MSG_CMPCT_BLOCK */
}

/* Takes the message header in w->header, whose body starts at `body`; returns where the next message starts, 0 if this
 * isn't one. */
static __always_inline u32 take_header(struct view *v, struct work *w, struct track *t, struct config *c, u32 body)
{
    u32 length = w->header[4], wanted = 0, c0 = w->header[1], c1 = w->header[2], c2 = w->header[3];
    if (w->header[0] != c->magic || length > MAX_MESSAGE)
        return 0;
    if (c0 == FOUR('h', 'e', 'a', 'd') && c1 == FOUR('e', 'r', 's', 0) && c2 == 0) {
        if (length > MAX_HEADERS)
            return 0;
        wanted = length;
    } else if (c0 == FOUR('i', 'n', 'v', 0) && c1 == 0 && c2 == 0) {
        if (length > MAX_INV)
            return 0;
        if (length && first_is_block(v, w, body))
            wanted = length;
    } else if ((c0 == FOUR('c', 'm', 'p', 'c') && c1 == FOUR('t', 'b', 'l', 'o') && c2 == FOUR('c', 'k', 0, 0)) ||
               (c0 == FOUR('b', 'l', 'o', 'c') && c1 == FOUR('k', 0, 0, 0) && c2 == 0)) {
        wanted = length < BLOCK_PREFIX ? length : BLOCK_PREFIX;
    }
    t->last = w->sequence + body - HEADER_SIZE;
    if (wanted) {
        t->want_from = t->last;
        t->want_to = w->sequence + body + wanted;
        want(w, body < HEADER_SIZE ? 0 : body - HEADER_SIZE, body + wanted, CAPTURED_ANNOUNCEMENT);
        w->announcements += 1;
    }
    return body + length;
}

/* Whether as many bytes as there are of a message header can be one's. */
static __always_inline int can_be_header(u32 start, u64 have, struct config *c)
{
    u32 known = have < 4 ? (1 << 8 * have) - 1 : ~0;
    return !((start ^ c->magic) & known);
}

/* Finds the messages of a segment in which a header starts, or goes on, at w->offset, following one guess. Where there
 * is no header after all, the guess stays what it was: this may be the segment that is forged. */
static __always_inline void follow(struct view *v, struct work *w, struct track *t, struct config *c)
{
    u64 have = t->have;
    if (have) {
        u32 at = UNKNOWN(w->offset), left = UNKNOWN(w->length) - at;
        u64 need = HEADER_SIZE - have;
        if (need > left)
            need = left;
        __builtin_memcpy(w->header, t->head, HEADER_SIZE);
        FORGET(have);
        FORGET(need);
        if (have > HEADER_SIZE - 1 || need == 0 || need > HEADER_SIZE)
            goto lost;
        if (load(v, w->start + at, (u8 *)w->header + have, need))
            goto lost;
        have += need;
        if (!can_be_header(w->header[0], have, c))
            goto lost;
        if (have < HEADER_SIZE) {
            __builtin_memcpy(t->head, w->header, HEADER_SIZE);
            t->have = have;
            t->next = w->sequence + at + need;
            want(w, at, at + need, CAPTURED_PARTIAL);
            return;
        }
        u32 next = take_header(v, w, t, c, at + need);
        if (!next)
            goto lost;
        w->found += 1;
        w->offset = next;
        t->have = 0;
    }
    for (int i = 0; i < MESSAGES_A_SEGMENT; i++) {
        u32 at = UNKNOWN(w->offset), length = UNKNOWN(w->length);
        if (at >= length || length - at < HEADER_SIZE)
            break;
        if (load(v, w->start + at, w->header, HEADER_SIZE))
            goto lost;
        u32 next = take_header(v, w, t, c, at + HEADER_SIZE);
        if (!next)
            goto lost;
        w->found += 1;
        w->offset = next;
    }
    u32 at = UNKNOWN(w->offset), length = UNKNOWN(w->length);
    t->next = w->sequence + at;
    if (at >= length)
        return;
    u64 left = length - at;
    FORGET(left);
    if (left > 0 && left < HEADER_SIZE) {
        if (load(v, w->start + at, w->header, left) || !can_be_header(w->header[0], left, c))
            goto lost;
        __builtin_memcpy(t->head, w->header, HEADER_SIZE);
        t->have = left;
        t->next = w->sequence + length;
        want(w, at, length, CAPTURED_PARTIAL);
    } else {
        want(w, at, length, CAPTURED_UNPLACED);
    }
    return;
lost:
    if (w->found)
        t->next = w->sequence + w->offset;
    w->lost = 1;
    want(w, w->offset, w->length, CAPTURED_UNPLACED);
}

/* One guess's view of a segment. */
static __always_inline void try_track(struct view *v, struct work *w, struct flow *f, u32 index, struct counters *n,
                                      struct config *c)
{
    struct track *t = &f->tracks[index];
    if (!t->valid)
        return;
    u32 length = UNKNOWN(w->length), sequence = UNKNOWN(w->sequence);
    s32 from = t->want_from - sequence, to = t->want_to - sequence, ahead = t->next - sequence;
    if (from < to && to > 0 && from < (s32)length)
        want(w, from < 0 ? 0 : from, to, CAPTURED_CONTINUED);
    /* A header's beginning that is in this segment too is taken from here. */
    if (t->have && ahead >= t->have && ahead - t->have < (s32)length) {
        ahead -= t->have;
        t->next -= t->have;
        t->have = 0;
    }
    if (ahead < 0 || ahead > MAX_MESSAGE + HEADER_SIZE)
        return;
    if (ahead >= (s32)length) {
        if (t->proven && (s32)(sequence - t->last) >= 0)
            w->placed = 1; /* in a message's body */
        return;
    }
    w->placed = 1;
    w->offset = ahead;
    w->found = 0;
    w->lost = 0;
    follow(v, w, t, c);
    if (w->found) {
        if (f->state == FLOW_OPAQUE)
            n->opaque_flows -= 1;
        f->state = FLOW_V1;
        f->unplaced = 0;
        t->proven = 1;
        if (w->fresh != index)
            f->main = index;
    } else if (w->lost) {
        if (w->fresh == index) {
            t->valid = 0;
        } else if (!t->proven && f->state == FLOW_NEW) {
            f->state = FLOW_OPAQUE; /* the very first bytes after SYN are no magic */
            n->opaque_flows += 1;
        }
    }
}

/* Guesses that a message starts here; returns the index of the guess, made in place of the less likely one. */
static __always_inline u32 guess(struct flow *f, u32 sequence)
{
    struct track made = {.next = sequence, .valid = 1};
    if (f->main ? !f->tracks[0].valid || f->tracks[1].valid : !f->tracks[0].valid) {
        f->tracks[0] = made;
        return 0;
    }
    f->tracks[1] = made;
    return 1;
}

/* Decides which bytes of a segment are captured, w->from to w->to, and brings the flow up to date. */
static __always_inline int choose(struct view *v, struct work *w, struct config *c, struct counters *n)
{
    if (!w->length && !(w->flags & TCP_SYN))
        return 0;
    struct flow *f = flows.lookup(&w->key);
    if (!f) {
        struct flow unknown = {};
        flows.update(&w->key, &unknown);
        f = flows.lookup(&w->key);
        if (!f)
            return 0;
    }
    if (w->flags & TCP_SYN) {
        if (f->state != FLOW_V1)
            __builtin_memset(f, 0, sizeof(*f));
        guess(f, w->sequence);
    }
    if (!w->length)
        return 0;
    n->segments += 1;
    w->from = 0xffffffff;
    w->to = 0;
    w->reasons = 0;
    w->announcements = 0;
    w->placed = 0;
    w->begins = 0;
    w->fresh = NONE;

    struct track *first = &f->tracks[0], *second = &f->tracks[1];
    u32 start = 0, sequence = w->sequence;
    if (w->length >= 4 && !load(v, w->start, &start, 4) && start == c->magic) {
        w->begins = 1;
        if ((first->valid && !first->have && first->next == sequence) ||
            (second->valid && !second->have && second->next == sequence)) {
            if (c->every_magic)
                want(w, 0, HEADER_SIZE, CAPTURED_BEGINS);
        } else {
            w->fresh = guess(f, sequence);
            want(w, 0, w->length, CAPTURED_BEGINS);
        }
    }
    try_track(v, w, f, 0, n, c);
    try_track(v, w, f, 1, n, c);
    if (first->valid && second->valid && first->next == second->next && first->have == second->have) {
        if (f->main)
            first->valid = 0;
        else
            second->valid = 0;
    }
    if (!w->placed && f->state != FLOW_OPAQUE) {
        f->unplaced += 1;
        if (f->unplaced > (f->state == FLOW_V1 ? V1_UNPLACED_LIMIT : UNPLACED_LIMIT)) {
            f->state = FLOW_OPAQUE;
            n->opaque_flows += 1;
        }
    }
    if (f->state == FLOW_OPAQUE && !w->begins)
        return 0;
    if (!w->placed)
        want(w, 0, w->length, CAPTURED_UNPLACED);
    if (!w->to)
        return 0;
    if (w->to > w->length)
        w->to = w->length;
    n->captured += 1;
    n->announcements += w->announcements;
    if (!(w->reasons & (CAPTURED_ANNOUNCEMENT | CAPTURED_CONTINUED)))
        n->surplus += 1;
    return 1;
}

static __always_inline void write_express(struct view *v, struct work *w, struct config *c, struct counters *n, u64 now)
{
    u32 zero = 0, from = UNKNOWN(w->from);
    u64 size = UNKNOWN(w->to) - from;
    struct express_room *room = rooms.lookup(&zero);
    if (!room)
        return;
    struct express_entry *entry = &room->entry;
    if (size > EXPRESS_PAYLOAD) {
        size = EXPRESS_PAYLOAD;
        n->cut += 1;
    }
    entry->arrival_ns = now;
    entry->flow = w->key;
    entry->sequence = w->sequence + from;
    entry->length = w->length - from;
    entry->captured = size;
    entry->skipped = from;
    entry->flags = w->flags;
    entry->reasons = w->reasons;
    FORGET(size);
    if (size == 0 || size > EXPRESS_PAYLOAD)
        return;
    if (load(v, w->start + from, room->payload, size) ||
        express.ringbuf_output(room, sizeof(*entry) + size, c->wakeup ? 0 : BPF_RB_NO_WAKEUP))
        n->dropped += 1;
    else
        n->express += 1;
}

static __always_inline u32 stamp_slot(u32 sequence)
{
    return sequence * 0x9e3779b1 >> 16 & (STAMPS - 1);
}

static __always_inline int is_same(struct flow_key *a, struct flow_key *b)
{
    u32 differing = 0;
    for (int i = 0; i < sizeof(*a) / sizeof(u32); i++)
        differing |= ((u32 *)a)[i] ^ ((u32 *)b)[i];
    return !differing;
}

/* Leaves what the mirrored frame can't carry for to_xsk to find. */
static __always_inline void leave_stamp(struct work *w, u64 now)
{
    u32 slot = stamp_slot(w->sequence);
    struct stamp *stamp = stamps.lookup(&slot);
    if (!stamp)
        return;
    stamp->key = w->key;
    stamp->sequence = w->sequence;
    stamp->skipped = w->from;
    stamp->arrival_ns = now;
}

/* Whether tc is to clone this packet. */
static __always_inline int capture(struct view *v, struct config *c, struct counters *n)
{
    u32 zero = 0;
    struct work *w = works.lookup(&zero);
    n->packets += 1;
    if (!w || !parse(v, w) || !choose(v, w, c, n))
        return 0;
    u64 now = bpf_ktime_get_ns();
    if (c->express)
        write_express(v, w, c, n, now);
    if (!c->mirror_ifindex)
        return 0;
    leave_stamp(w, now);
    return 1;
}

static __always_inline void clone_to_mirror(struct __sk_buff *skb, struct config *c, struct counters *n)
{
    if (bpf_clone_redirect(skb, c->mirror_ifindex, 0))
        n->uncloned += 1;
    else
        n->cloned += 1;
}

int classify(struct xdp_md *ctx)
{
    u32 zero = 0;
    struct config *c = config.lookup(&zero);
    struct counters *n = counters.lookup(&zero);
    struct view v = {.ctx = ctx, .data = (void *)(long)ctx->data, .end = (void *)(long)ctx->data_end};
    v.size = v.end - v.data;
    if (!c || !n || !capture(&v, c, n))
        return XDP_PASS;
    if (bpf_xdp_adjust_meta(ctx, -(int)sizeof(u32))) {
        n->unmarked += 1;
        return XDP_PASS;
    }
    u32 *mark = (void *)(long)ctx->data_meta;
    if ((void *)(mark + 1) <= (void *)(long)ctx->data) {
        *mark = MARK;
        n->marked += 1;
    }
    return XDP_PASS;
}

int mirror(struct __sk_buff *skb)
{
    u32 zero = 0, *mark = (void *)(long)skb->data_meta;
    if ((void *)(mark + 1) > (void *)(long)skb->data || *mark != MARK)
        return TC_ACT_UNSPEC;
    struct config *c = config.lookup(&zero);
    struct counters *n = counters.lookup(&zero);
    if (c && n && c->mirror_ifindex)
        clone_to_mirror(skb, c, n);
    return TC_ACT_UNSPEC;
}

int classify_tc(struct __sk_buff *skb)
{
    u32 zero = 0;
    struct config *c = config.lookup(&zero);
    struct counters *n = counters.lookup(&zero);
    struct view v = {.ctx = skb, .size = skb->len, .skb = 1};
    if (c && n && capture(&v, c, n))
        clone_to_mirror(skb, c, n);
    return TC_ACT_UNSPEC;
}

int to_xsk(struct xdp_md *ctx)
{
    u32 zero = 0;
    struct counters *n = counters.lookup(&zero);
    struct work *w = works.lookup(&zero);
    struct view v = {.ctx = ctx, .data = (void *)(long)ctx->data, .end = (void *)(long)ctx->data_end};
    v.size = v.end - v.data;
    if (!n || !w || !parse(&v, w))
        return XDP_DROP;
    struct mirror_stamp carried = {.mark = MARK};
    u32 slot = stamp_slot(w->sequence);
    struct stamp *left = stamps.lookup(&slot);
    if (left && left->sequence == w->sequence && is_same(&left->key, &w->key)) {
        carried.arrival_ns = left->arrival_ns;
        carried.skipped = left->skipped;
    }
    if (!bpf_xdp_adjust_meta(ctx, -(int)sizeof(carried))) {
        struct mirror_stamp *stamp = (void *)(long)ctx->data_meta;
        if ((void *)(stamp + 1) <= (void *)(long)ctx->data)
            *stamp = carried;
    }
    int verdict = xsks.redirect_map(ctx->rx_queue_index, XDP_DROP);
    if (verdict == XDP_REDIRECT)
        n->redirected += 1;
    else
        n->unredirected += 1;
    return verdict;
}
