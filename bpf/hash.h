/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * The keyed hash of a flow: SipHash-1-3 over 64-bit words, without the usual
 * length block, since the last word names the family. Package flowhash is its
 * twin in Go.
 */
#pragma once

#include "fairlead.h"
#include "maps.h"

static __always_inline __u64 rotate(__u64 x, int bits)
{
	return (x << bits) | (x >> (64 - bits));
}

struct sip {
	__u64 v0, v1, v2, v3;
};

static __always_inline void sip_round(struct sip *s)
{
	s->v0 += s->v1;
	s->v1 = rotate(s->v1, 13) ^ s->v0;
	s->v0 = rotate(s->v0, 32);
	s->v2 += s->v3;
	s->v3 = rotate(s->v3, 16) ^ s->v2;
	s->v0 += s->v3;
	s->v3 = rotate(s->v3, 21) ^ s->v0;
	s->v2 += s->v1;
	s->v1 = rotate(s->v1, 17) ^ s->v2;
	s->v2 = rotate(s->v2, 32);
}

static __always_inline void sip_word(struct sip *s, __u64 word)
{
	s->v3 ^= word;
	sip_round(s);
	s->v0 ^= word;
}

/* The family is the client's view: 4 when both addresses are v4-mapped. */
static __always_inline __u64 flow_hash(const struct addr *client, const struct addr *vip,
				       __be16 client_port, __be16 vip_port, __u8 proto, __u8 family)
{
	__u64 key0 = config.key[0], key1 = config.key[1];
	struct sip s = {
		.v0 = key0 ^ 0x736f6d6570736575ULL,
		.v1 = key1 ^ 0x646f72616e646f6dULL,
		.v2 = key0 ^ 0x6c7967656e657261ULL,
		.v3 = key1 ^ 0x7465646279746573ULL,
	};

	if (family == 4) {
		sip_word(&s, client->w[3] | (__u64)vip->w[3] << 32);
	} else {
		sip_word(&s, client->w[0] | (__u64)client->w[1] << 32);
		sip_word(&s, client->w[2] | (__u64)client->w[3] << 32);
		sip_word(&s, vip->w[0] | (__u64)vip->w[1] << 32);
		sip_word(&s, vip->w[2] | (__u64)vip->w[3] << 32);
	}
	sip_word(&s,
		 client_port | (__u64)vip_port << 16 | (__u64)proto << 32 | (__u64)family << 56);
	s.v2 ^= 0xff;
	sip_round(&s);
	sip_round(&s);
	sip_round(&s);
	return s.v0 ^ s.v1 ^ s.v2 ^ s.v3;
}
