/* Where messages start in a flow. Two guesses are kept, each followed from message to message; what neither can place
 * is captured whole, so nothing here needs to be right, only seldom wrong. Pure: no map is used here. */
#ifndef SPRINT_FRAMING_H
#define SPRINT_FRAMING_H

#include "packet.h"

#define MSG_WITNESS_FLAG 0x40000000
#define NONE 2
#define FOUR(a, b, c, d) ((u32)(a) | (u32)(b) << 8 | (u32)(c) << 16 | (u32)(d) << 24) /* as they lie in memory */

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
    if (length - wanted >= LONG_BODY) {
        t->body_from = w->sequence + body + wanted;
        t->body_to = w->sequence + body + length;
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
        if (have > HEADER_SIZE - 1 || need < ONE || need > HEADER_SIZE)
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
    if (left >= ONE && left < HEADER_SIZE) {
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

/* Whether a guess knows where messages start in a segment, or that none does. */
static __always_inline int places_it(struct track *t, struct work *w)
{
    u32 length = UNKNOWN(w->length), sequence = UNKNOWN(w->sequence);
    s32 ahead = t->next - sequence;
    if (!t->valid)
        return 0;
    if (t->proven && (s32)(sequence - t->body_from) >= 0 && (s32)(t->body_to - sequence) >= (s32)length)
        return 1;
    if (ahead < 0 || ahead > MAX_MESSAGE + HEADER_SIZE)
        return 0;
    return ahead < (s32)length || (t->proven && (s32)(sequence - t->last) >= 0);
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
    if (t->proven && (s32)(sequence - t->body_from) >= 0 && (s32)(t->body_to - sequence) >= (s32)length)
        w->placed = 1; /* in a long body, whatever came since */
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
    /* A magic that was searched for hides nothing before another message follows where its own says. */
    w->doubtful = UNKNOWN(w->searched) && w->fresh == index;
    if (!UNKNOWN(w->doubtful))
        w->placed = 1;
    w->offset = ahead;
    w->found = 0;
    w->lost = 0;
    follow(v, w, t, c);
    if (w->found || (!w->lost && t->have >= 4)) { /* a magic, at least */
        if (f->state == FLOW_OPAQUE)
            n->opaque_flows -= 1;
        f->state = FLOW_V1;
        f->unplaced = 0;
    }
    if (w->found) {
        if (!UNKNOWN(w->doubtful))
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

/* Looks for the magic in a segment that no guess can place, as after a loss amid messages that are sent without a pause:
 * else only a segment that begins with it would tell where the next one starts. Whether it was found; then at
 * w->offset. `copy` has room for EXPRESS_PAYLOAD bytes. */
static __always_inline int search(struct view *v, struct work *w, struct config *c, u8 *copy)
{
    u32 magic = c->magic, from = 0;
    u64 size = UNKNOWN(w->length);
    if (size > SEARCHED_BYTES)
        size = SEARCHED_BYTES;
    FORGET(size);
    if (size < ONE || size > SEARCHED_BYTES || load(v, w->start, copy, size))
        return 0;
    w->offset = 0;
    /* Eight places at a time, without a branch for each: what the verifier adds up are branches. */
    for (u32 at = 0; at < SEARCHED_BYTES; at += 8) {
        u64 hits = 0;
        for (int i = 0; i < 8; i++)
            hits |= (u64)(*(u32 *)(copy + at + i) ^ magic) - 1;
        if (hits >> 63) {
            w->offset = at;
            break;
        }
        if (at >= UNKNOWN(w->length))
            break;
    }
    from = UNKNOWN(w->offset);
    if (from > SEARCHED_BYTES)
        return 0;
    for (int i = 0; i < 8; i++) {
        if (*(u32 *)(copy + from + i) == magic) {
            w->offset = from + i;
            return from + i + 4 <= w->length;
        }
    }
    return 0;
}

/* Something has become of a flow that other CPUs don't know of which remember it. */
static __always_inline void forget(struct config *c)
{
    __sync_fetch_and_add(&c->epoch, 1);
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

#endif
