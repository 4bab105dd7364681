/* address.h: addresses of the cluster, inside libvmmc. */
#ifndef VMMC_ADDRESS_H
#define VMMC_ADDRESS_H

#include <netinet/in.h>

#include "socket.h"

/* A program's socket address as a socket of `family` takes it.  0, -EINVAL (too short) or -EAFNOSUPPORT. */
int address_read(const struct sockaddr *from, socklen_t length, int family, struct vmmc_address *to);
/* The other way, as getsockname does: cut to *length, which then becomes the whole length. */
void address_write(const struct vmmc_address *from, int family, struct sockaddr *to, socklen_t *length);

bool address_is_v4(const struct vmmc_address *address); /* also a v4-mapped one */
bool address_is_wildcard(const struct vmmc_address *address);
bool address_is_loopback(const struct vmmc_address *address);
bool address_is_local(const struct vmmc_address *address); /* this node's: may be bound to */

/* Replace the ip by loopback, or by a node's, of the same family. */
void address_loopback(struct vmmc_address *address);
void address_of_node(struct vmmc_address *address, uint32_t node);

/* socket_route_of for an address that was read. */
enum socket_route address_route(const struct vmmc_address *address, uint32_t *node);

#endif
