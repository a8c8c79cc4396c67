/* Ingest: finds announcements of blocks in peer-to-peer flows as their packets pass an interface.
 *
 *   classify     XDP on the interface: chooses segments; writes them to the ring buffer, marks them for tc
 *   mirror       tc ingress: clones marked packets to the mirror link
 *   classify_tc  tc ingress, where no XDP program can be: chooses segments itself, and clones them
 *   shorten      tc egress of the mirror link: brings a clone that is too large for it down to what is needed
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
#include <uapi/linux/pkt_cls.h>

#include "framing.h"

struct express_room {
    struct express_entry entry;
    u8 payload[EXPRESS_PAYLOAD];
};

struct stamp {
    struct flow_key key;
    u32 sequence;
    u32 skipped;
    u32 wanted; /* bytes behind those */
    u64 arrival_ns;
};

BPF_F_TABLE("array", u32, struct config, config, 1, BPF_F_MMAPABLE);
BPF_F_TABLE("array", u32, u64, ports, 1024, BPF_F_MMAPABLE); /* a bit for each port */
BPF_TABLE("lru_hash", struct flow_key, struct flow, flows, FLOWS);
BPF_PERCPU_ARRAY(counters, struct counters, 1);
BPF_PERCPU_ARRAY(works, struct work, 1);
BPF_PERCPU_ARRAY(places, struct place, PLACES);
BPF_PERCPU_ARRAY(rooms, struct express_room, 1);
BPF_ARRAY(stamps, struct stamp, STAMPS);
BPF_RINGBUF_OUTPUT(express, RING_PAGES);
BPF_XSKMAP(xsks, XSKS);

static __always_inline int is_watched(u16 port)
{
    u32 word = port >> 6;
    u64 *bits = ports.lookup(&word);
    return bits && (*bits >> (port & 63) & 1);
}

static __always_inline int is_same(struct flow_key *a, struct flow_key *b)
{
    u32 differing = 0;
    for (int i = 0; i < sizeof(*a) / sizeof(u32); i++)
        differing |= ((u32 *)a)[i] ^ ((u32 *)b)[i];
    return !differing;
}

static __always_inline struct place *place_of(struct flow_key *key)
{
    u32 at = (key->source_port ^ key->destination_port ^ *(u32 *)(key->source + 12)) & (PLACES - 1);
    return places.lookup(&at);
}

/* Whether this CPU remembers that the segment is of no interest: most of a download are such, and looking up the flow
 * is most of what they would cost. */
static __always_inline int is_known(struct work *w, struct config *c)
{
    struct place *place = place_of(&w->key);
    if (!place || place->epoch != c->epoch || w->begins || !w->length || w->flags & TCP_SYN)
        return 0;
    u32 ahead = w->sequence - place->from;
    return ahead < place->size && w->length <= place->size - ahead && is_same(&place->key, &w->key);
}

/* Remembers how far from this segment on, which nobody wants, the flow's next bytes are of no interest either: up to
 * where a guess has the next message start, in the body of one, or in a flow that can't be read. */
static __always_inline void remember(struct work *w, struct flow *f)
{
    struct place *place = place_of(&w->key);
    struct track *main = &f->tracks[f->main & 1];
    u32 size = PLACE_BYTES, sequence = w->sequence;
    if (!place)
        return;
    if (f->state != FLOW_OPAQUE && (!main->valid || !main->proven || (s32)(sequence - main->last) < 0 ||
                                    (s32)(main->next - main->have - sequence) < (s32)w->length))
        return;
    for (int i = 0; i < 2; i++) {
        struct track *t = &f->tracks[i];
        s32 ahead = t->next - t->have - sequence;
        if (!t->valid)
            continue;
        if (t->want_from != t->want_to && (s32)(t->want_to - sequence) > 0)
            return;
        if (ahead >= 0 && ahead < size)
            size = ahead;
    }
    place->key = w->key;
    place->from = sequence;
    place->size = size;
    place->epoch = w->epoch;
}

/* Decides which bytes of a segment are captured, w->from to w->to, and brings the flow up to date. */
static __always_inline int choose(struct view *v, struct work *w, struct config *c, struct counters *n)
{
    if (!w->length && !(w->flags & TCP_SYN))
        return 0;
    w->epoch = c->epoch; /* before the flow is looked at, which another CPU may be changing */
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
        else
            f->unplaced = V1_UNPLACED_LIMIT - UNPLACED_LIMIT; /* perhaps it is another connection, which doesn't */
        guess(f, w->sequence);
        forget(c);
    }
    if (!w->length)
        return 0;
    n->segments += 1;
    w->from = 0xffffffff;
    w->to = 0;
    w->reasons = 0;
    w->announcements = 0;
    w->placed = w->searched = 0;
    w->fresh = NONE;

    struct track *first = &f->tracks[0], *second = &f->tracks[1];
    u32 sequence = w->sequence;
    w->main = f->main & 1;
    w->state = f->state;
    w->rival = f->tracks[f->main & 1 ^ 1].next;
    if (w->begins) {
        if ((first->valid && !first->have && first->next == sequence) ||
            (second->valid && !second->have && second->next == sequence)) {
            if (c->every_magic)
                want(w, 0, HEADER_SIZE, CAPTURED_BEGINS);
        } else {
            w->fresh = guess(f, sequence);
            want(w, 0, w->length, CAPTURED_BEGINS);
        }
    } else {
        w->searched = f->state != FLOW_OPAQUE && !places_it(first, w) && !places_it(second, w);
        if (UNKNOWN(w->searched)) {
            u32 zero = 0;
            struct express_room *room = rooms.lookup(&zero);
            w->searched = room && search(v, w, c, room->payload);
            if (UNKNOWN(w->searched))
                w->fresh = guess(f, sequence + UNKNOWN(w->offset));
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
    u32 rival = UNKNOWN(w->main) ^ 1;
    if (w->fresh != NONE || f->state != w->state || f->tracks[rival & 1].next != w->rival)
        forget(c);
    if (f->state == FLOW_OPAQUE && !w->begins) {
        remember(w, f);
        return 0;
    }
    if (!w->placed)
        want(w, 0, w->length, CAPTURED_UNPLACED);
    if (!w->to) {
        remember(w, f);
        return 0;
    }
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
    if (size < ONE || size > EXPRESS_PAYLOAD)
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

/* Leaves what the mirrored frame can't carry for shorten and to_xsk to find. */
static __always_inline void leave_stamp(struct flow_key *key, u32 sequence, u32 skipped, u32 wanted, u64 now)
{
    u32 slot = stamp_slot(sequence);
    struct stamp *stamp = stamps.lookup(&slot);
    if (!stamp)
        return;
    stamp->key = *key;
    stamp->sequence = sequence;
    stamp->skipped = skipped;
    stamp->wanted = wanted;
    stamp->arrival_ns = now;
}

static __always_inline struct stamp *find_stamp(struct work *w)
{
    u32 slot = stamp_slot(w->sequence);
    struct stamp *stamp = stamps.lookup(&slot);
    return stamp && stamp->sequence == w->sequence && is_same(&stamp->key, &w->key) ? stamp : 0;
}

/* Whether tc is to clone this packet. */
static __always_inline int capture(struct view *v, struct config *c, struct counters *n)
{
    u32 zero = 0;
    struct work *w = works.lookup(&zero);
    n->packets += 1;
    if (!w || !parse(v, w))
        return 0;
    w->begins = begins_with(v, w, c->magic);
    if (is_known(w, c)) {
        n->segments += 1;
        return 0;
    }
    if (!choose(v, w, c, n))
        return 0;
    u64 now = bpf_ktime_get_ns();
    if (c->express)
        write_express(v, w, c, n, now);
    if (!c->mirror_ifindex)
        return 0;
    leave_stamp(&w->key, w->sequence, w->from, w->to - w->from, now);
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

/* What GRO had joined is cut up again on its way into the mirror link, 64 KiB into 45 frames for 152 bytes of interest,
 * and a jumbo frame would be dropped there. So those bytes are moved to the front of the clone, as a segment of their own.
 * Where more is needed than a frame takes, what had been joined stays as it is, and of a jumbo frame the first are kept. */
int shorten(struct __sk_buff *skb)
{
    u32 zero = 0, joined = skb->gso_size;
    if (!joined && skb->len <= MIRROR_FRAME)
        return TC_ACT_UNSPEC;
    struct counters *n = counters.lookup(&zero);
    struct work *w = works.lookup(&zero);
    struct express_room *room = rooms.lookup(&zero);
    struct view v = {.ctx = skb, .size = skb->len, .skb = 1};
    if (!n || !w || !room || !parse(&v, w) || w->flags & TCP_SYN)
        return TC_ACT_UNSPEC;
    struct stamp *left = find_stamp(w);
    if (!left)
        return TC_ACT_UNSPEC;
    u32 from = UNKNOWN(left->skipped), sequence = w->sequence + from;
    u64 size = UNKNOWN(left->wanted), arrival_ns = left->arrival_ns;
    if (w->start + size > MIRROR_FRAME) {
        if (joined)
            return TC_ACT_UNSPEC;
        size = MIRROR_FRAME - w->start;
    }
    FORGET(size);
    if (size < ONE || size > MIRROR_FRAME || bpf_skb_load_bytes(skb, w->start + from, room->payload, size) ||
        bpf_skb_change_tail(skb, w->start + size, 0))
        return TC_ACT_UNSPEC;
    u32 written = htonl(sequence);
    u16 length = htons(w->start + size - w->network - (w->is_ipv6 ? 40 : 0));
    FORGET(size);
    if (size < ONE || size > MIRROR_FRAME || bpf_skb_store_bytes(skb, w->start, room->payload, size, 0) ||
        bpf_skb_store_bytes(skb, w->network + (w->is_ipv6 ? 4 : 2), &length, 2, 0) ||
        bpf_skb_store_bytes(skb, w->transport + 4, &written, 4, 0))
        return TC_ACT_SHOT; /* neither what it was nor what it should be */
    n->shortened += 1;
    leave_stamp(&w->key, sequence, 0, size, arrival_ns);
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
    struct stamp *left = find_stamp(w);
    if (left) {
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
