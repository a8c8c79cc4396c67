/* The headers of a packet, up to its TCP payload; the same code for XDP and for tc. Uses no map: capture.c does. */
#ifndef SPRINT_PACKET_H
#define SPRINT_PACKET_H

#include <uapi/linux/bpf.h>
#include <uapi/linux/if_ether.h>
#include <uapi/linux/ip.h>
#include <uapi/linux/ipv6.h>
#include <uapi/linux/tcp.h>

#include "common.h"

#define TCP_PROTOCOL 6
#define TCP_SYN 2
#define VLAN_TAGS 2
#define EXTENSION_HEADERS 6

/* For the verifier. It wants the bounds of a size compared right before its use, in 64 bits: FORGET keeps the compiler
 * from dropping a comparison whose outcome it can prove itself. And it follows a value that is used as a size through
 * every way it may have come, unless it came from memory: UNKNOWN has the compiler read a field from there once more.
 * Without that, sixteen messages a segment are more than it takes; with it, sixty-four cost a quarter of its limit.
 * Before Linux 6.8 it learns nothing of a size from `!= 0`: ONE is a 1 that the compiler doesn't know, to compare with. */
#define FORGET(size) asm volatile("" : "+r"(size))
#define UNKNOWN(field) (*(volatile typeof(field) *)&(field))
#define ONE ({ u64 one = 1; FORGET(one); one; })

/* A segment while it is looked at. The header has room for a partial one and as much again: the verifier adds the most
 * that each part may have. */
struct work {
    u32 network; /* where its IP header starts, from the frame's first byte, */
    u32 transport; /* TCP's, */
    u32 start; /* and the payload */
    u32 is_ipv6;
    u32 length;
    u32 sequence; /* of the payload's first byte */
    u32 offset; /* of the next message header, in the payload */
    u32 from; /* what is captured of the payload */
    u32 to;
    u32 reasons; /* CAPTURED_… */
    u32 announcements;
    u32 found; /* message headers, by the guess that is being followed */
    u32 lost;  /* there was none where one was due */
    u32 flags;
    u32 begins; /* with the magic */
    u32 fresh;  /* the guess that was made from this segment, or NONE */
    u32 epoch;  /* config's, before this segment, */
    u32 main;   /* and the flow's main guess, */
    u32 state;  /* its state, */
    u32 rival;  /* and where its other guess has the next message start */
    u32 placed; /* 1: a guess knows where messages start in it, or that none does */
    u32 searched; /* 1: the new guess is the first magic in it, which may stand in a message's body */
    u32 doubtful; /* 1: that one is being followed */
    u32 header[12];
    struct flow_key key;
};

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

/* Whether the payload begins with these four bytes. */
static __always_inline int begins_with(struct view *v, struct work *w, u32 word)
{
    u32 start = UNKNOWN(w->start), first;
    if (w->length < 4)
        return 0;
    if (v->skb)
        return !bpf_skb_load_bytes(v->ctx, start, &first, 4) && first == word;
    if (start > 0x7fff)
        return 0;
    u32 *at = v->data + start;
    return (void *)(at + 1) <= v->end && *at == word;
}

/* Of capture.c: whether flows of this port are followed. */
static __always_inline int is_watched(u16 port);

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
    w->network = network;
    w->transport = transport;
    w->is_ipv6 = protocol != 0x0800;
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

#endif
