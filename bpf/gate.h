/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * What some services ask of their clients' packets before anything is chosen:
 * that the client is one of theirs, and that there are not too many. Nothing
 * here runs for services that ask for neither.
 */
#pragma once

#include "count.h"
#include "parse.h"

#define TAKE_TRIES 16
#define TICKS_A_SECOND (1000000000ULL << TICKS_SHIFT)

/* Takes a packet's cost out of a bucket, if that has so much. Several CPUs may
 * do so at once; who is beaten so often is one too many. */
static __always_inline bool take(__u64 *until, __u64 cost, __u64 burst, __u64 now)
{
	for (int i = 0; i < TAKE_TRIES; i++) {
		__u64 was = READ_ONCE(*until), ahead = was - now;

		/* In the past; or further ahead than it can be, though another CPU may
		 * have read the clock a moment later: as good as never used. */
		if ((__s64)ahead < 0 || ahead > burst + TICKS_A_SECOND)
			ahead = 0;
		if (ahead + cost > burst)
			return false;
		if (__sync_val_compare_and_swap(until, was, now + ahead + cost) == was)
			return true;
	}
	return false;
}

static __always_inline bool within(const struct rates *rates, struct bucket *bucket,
				   const struct packet *packet, __u64 now)
{
	__u64 units[RATES] = {!!(packet->flags & PACKET_SYN), 1, (__u64)packet->length * 8};

	for (int i = 0; i < RATES; i++) {
		if (!rates->cost[i] || !units[i])
			continue;
		if (!take(&bucket->until[i], units[i] * rates->cost[i] >> RATE_COST_SHIFT,
			  rates->burst[i], now))
			return false;
	}
	return true;
}

/* The bucket of a client of a service; NULL when there is no room for one. */
static __always_inline struct bucket *client_bucket(const struct packet *packet, __u32 service)
{
	struct client_key key = {.client = packet->src, .service = service};
	struct bucket fresh = {}, *bucket;

	if (packet->family == 6)
		key.client.w[2] = key.client.w[3] = 0;
	bucket = bpf_map_lookup_elem(&client_buckets, &key);
	if (bucket)
		return bucket;
	bpf_map_update_elem(&client_buckets, &key, &fresh, BPF_NOEXIST);
	return bpf_map_lookup_elem(&client_buckets, &key);
}

__noinline int limit(const struct packet *packet, __u32 service)
{
	struct service_limit *limit = bpf_map_lookup_elem(&service_limits, &service);
	__u64 now = bpf_ktime_get_ns() << TICKS_SHIFT;
	struct bucket *bucket;

	if (!packet || !limit || config.tracing)
		return DROP_NONE;
	if (limit->client.cost[RATE_CONNECTIONS] | limit->client.cost[RATE_PACKETS] |
	    limit->client.cost[RATE_BITS]) {
		bucket = client_bucket(packet, service);
		if (bucket && !within(&limit->client, bucket, packet, now))
			return DROP_LIMIT_CLIENT;
	}
	return within(&limit->all, &limit->bucket, packet, now) ? DROP_NONE : DROP_LIMIT_SERVICE;
}

/* Whether a packet may come to a service at all. Returns 0 or an enum drop. */
__noinline int gate(const struct packet *packet, __u32 service, __u32 flags)
{
	if (!packet)
		return DROP_MALFORMED;
	if (flags & SERVICE_RANGES) {
		struct source_key key = {.prefix_len = 8 * (sizeof(key) - sizeof(key.prefix_len)),
					 .service = bpf_htonl(service),
					 .address = packet->src};

		if (!bpf_map_lookup_elem(&source_ranges, &key))
			return DROP_SOURCE_RANGE;
	}
	return flags & SERVICE_LIMITS ? limit(packet, service) : DROP_NONE;
}
