/*
 * address.c: the cluster's addresses, and where a connection to an address goes.
 *
 * Node i is 198.18.0.0 + i + 1 and fd00:766d:6d63::(i + 1).  On a node, loopback and its own addresses
 * are the node itself.  Everything else is the kernel's.
 */
#include "address.h"

#include <errno.h>
#include <stdlib.h>
#include <stdio.h>
#include <string.h>

#include "socket.h"
#include "sys.h"

static const uint8_t v4_prefix[12] = { 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff };
static const uint8_t v6_prefix[6] = { 0xfd, 0x00, 0x76, 0x6d, 0x6d, 0x63 }; /* fd00:766d:6d63::/48 */
enum { V4_NODES = 0xc6120000u, V4_NODES_MASK = 0xfffe0000u };               /* 198.18.0.0/15 */

/* ---- the place of this process, from the environment ---- */

/* A whole decimal number of at most `max`; *end is what follows it. */
static bool parse_number(const char *text, uint32_t max, uint32_t *value, const char **end) {
  uint64_t n = 0;
  const char *p = text;
  for (; *p >= '0' && *p <= '9' && n <= max; p++) n = n * 10 + (uint64_t)(*p - '0');
  *value = (uint32_t)n;
  *end = p;
  return p != text && n <= max;
}

bool socket_place(uint32_t *node, uint32_t *nodes) {
  /* (nodes << 32 | node) once both were found; looked up again while they are not, since a program that
   * links this library may set its environment itself. */
  static _Atomic uint64_t place;
  uint64_t known = atomic_load_explicit(&place, memory_order_relaxed);
  if (!known) {
    const char *name = getenv("VMMC_NODE"), *count = getenv("VMMC_NODES"), *end;
    uint32_t own, all;
    if (!name || !count) return false;
    if (strncmp(name, "node", 4) == 0) name += 4;
    if (!parse_number(name, VMMC_NODES_MAX - 1, &own, &end) || *end) return false;
    if (!parse_number(count, VMMC_NODES_MAX, &all, &end) || *end || own >= all) return false;
    known = (uint64_t)all << 32 | own;
    atomic_store_explicit(&place, known, memory_order_relaxed);
  }
  *node = (uint32_t)known;
  *nodes = (uint32_t)(known >> 32);
  return true;
}

/* ---- ports that stay the kernel's ---- */

static uint8_t kernel_port[65536 / 8];

/* Says the first piece of nonsense: one line, however much of it there is. */
static void complain(const char *text, int count) {
  char line[256], more[32] = "";
  if (count > 1) snprintf(more, sizeof more, " (and %d more)", count - 1);
  int n = snprintf(line, sizeof line,
                   "vmmc: VMMC_KERNEL_PORTS: \"%.64s\"%s is no port or range of ports (like 80,8000-8010); "
                   "ignored\n",
                   text, more);
  sys_call(SYS_write, 2, (long)line, n, 0, 0, 0);
}

static void parse_kernel_ports(void) {
  const char *text = getenv("VMMC_KERNEL_PORTS");
  static char copy[4096];
  if (!text) return;
  snprintf(copy, sizeof copy, "%s", text);
  char *rest = copy;
  const char *nonsense = NULL;
  int count = 0;
  for (char *item; (item = strsep(&rest, ",")) != NULL;) {
    while (*item == ' ') item++;
    char *last = item + strlen(item);
    while (last > item && last[-1] == ' ') *--last = 0;
    if (!*item) continue;
    uint32_t from, to;
    const char *end;
    bool good = parse_number(item, 65535, &from, &end);
    to = from;
    if (good && *end == '-') good = parse_number(end + 1, 65535, &to, &end);
    if (!good || *end || !from || to < from) {
      if (!count++) nonsense = item;
      continue;
    }
    for (uint32_t port = from; port <= to; port++) kernel_port[port / 8] |= (uint8_t)(1u << port % 8);
  }
  if (count) complain(nonsense, count);
}

bool socket_port_is_kernels(uint16_t port) {
  static pthread_once_t once = PTHREAD_ONCE_INIT;
  pthread_once(&once, parse_kernel_ports);
  return kernel_port[port / 8] >> port % 8 & 1;
}

/* ---- reading and showing addresses ---- */

int address_read(const struct sockaddr *from, socklen_t length, int family, struct vmmc_address *to) {
  memset(to, 0, sizeof *to);
  if (family == AF_INET) {
    struct sockaddr_in in;
    if (length < (socklen_t)sizeof in) return -EINVAL;
    memcpy(&in, from, sizeof in); /* the program's may be unaligned */
    if (in.sin_family != AF_INET) return -EAFNOSUPPORT;
    memcpy(to->ip, v4_prefix, sizeof v4_prefix);
    memcpy(to->ip + 12, &in.sin_addr, 4);
    to->port = ntohs(in.sin_port);
  } else {
    struct sockaddr_in6 in6 = { 0 };
    if (length < 24) return -EINVAL; /* without sin6_scope_id, as Linux takes it (RFC 2133) */
    memcpy(&in6, from, length < (socklen_t)sizeof in6 ? length : sizeof in6);
    if (in6.sin6_family != AF_INET6) return -EAFNOSUPPORT;
    memcpy(to->ip, &in6.sin6_addr, 16);
    to->port = ntohs(in6.sin6_port);
  }
  to->family = (uint16_t)family;
  return 0;
}

void address_write(const struct vmmc_address *from, int family, struct sockaddr *to, socklen_t *length) {
  union {
    struct sockaddr_in in;
    struct sockaddr_in6 in6;
  } address = { 0 };
  socklen_t size;
  if (family == AF_INET) {
    address.in.sin_family = AF_INET;
    address.in.sin_port = htons(from->port);
    memcpy(&address.in.sin_addr, from->ip + 12, 4);
    size = sizeof address.in;
  } else {
    address.in6.sin6_family = AF_INET6;
    address.in6.sin6_port = htons(from->port);
    memcpy(&address.in6.sin6_addr, from->ip, 16);
    size = sizeof address.in6;
  }
  memcpy(to, &address, *length < size ? *length : size);
  *length = size; /* the whole size, also when it was cut: accept(2) */
}

bool address_is_v4(const struct vmmc_address *address) {
  return memcmp(address->ip, v4_prefix, sizeof v4_prefix) == 0;
}

static uint32_t v4_of(const struct vmmc_address *address) {
  const uint8_t *b = address->ip + 12;
  return (uint32_t)b[0] << 24 | (uint32_t)b[1] << 16 | (uint32_t)b[2] << 8 | b[3];
}

static void set_v4(struct vmmc_address *address, uint32_t ip) {
  memcpy(address->ip, v4_prefix, sizeof v4_prefix);
  for (int i = 0; i < 4; i++) address->ip[12 + i] = (uint8_t)(ip >> (24 - 8 * i));
}

static bool is_v6_one(const struct vmmc_address *address) {
  static const uint8_t one[16] = { [15] = 1 };
  return memcmp(address->ip, one, 16) == 0;
}

bool address_is_wildcard(const struct vmmc_address *address) {
  static const uint8_t zero[16];
  return address_is_v4(address) ? v4_of(address) == 0 : memcmp(address->ip, zero, 16) == 0;
}

bool address_is_loopback(const struct vmmc_address *address) {
  return address_is_v4(address) ? v4_of(address) >> 24 == 127 : is_v6_one(address);
}

void address_loopback(struct vmmc_address *address) {
  if (address_is_v4(address)) {
    set_v4(address, 0x7f000001u);
  } else {
    memset(address->ip, 0, 16);
    address->ip[15] = 1;
  }
}

void address_of_node(struct vmmc_address *address, uint32_t node) {
  if (address_is_v4(address)) {
    set_v4(address, V4_NODES + node + 1);
  } else {
    memset(address->ip, 0, 16);
    memcpy(address->ip, v6_prefix, sizeof v6_prefix);
    address->ip[14] = (uint8_t)((node + 1) >> 8);
    address->ip[15] = (uint8_t)(node + 1);
  }
}

/* True when the address lies in the cluster's range; *node is UINT32_MAX where no node can have it. */
static bool in_cluster(const struct vmmc_address *address, uint32_t *node) {
  uint64_t number = 0; /* node + 1 */
  if (address_is_v4(address)) {
    if ((v4_of(address) & V4_NODES_MASK) != V4_NODES) return false;
    number = v4_of(address) - V4_NODES;
  } else {
    if (memcmp(address->ip, v6_prefix, sizeof v6_prefix) != 0) return false;
    for (int i = 6; i < 8; i++) number |= address->ip[i]; /* subnets: there are none */
    if (number) number = VMMC_NODES_MAX + 1;
    for (int i = 8; i < 16 && number <= VMMC_NODES_MAX; i++) number = number << 8 | address->ip[i];
  }
  *node = number && number <= VMMC_NODES_MAX ? (uint32_t)number - 1 : UINT32_MAX;
  return true;
}

enum socket_route address_route(const struct vmmc_address *address, uint32_t *node) {
  uint32_t own, nodes;
  if (!socket_place(&own, &nodes)) return ROUTE_KERNEL;
  if (address_is_wildcard(address) || address_is_loopback(address)) {
    *node = own;
    return socket_port_is_kernels(address->port) ? ROUTE_KERNEL : ROUTE_NODE;
  }
  if (!in_cluster(address, node)) return ROUTE_KERNEL;
  return *node < nodes ? ROUTE_NODE : ROUTE_UNREACHABLE;
}

enum socket_route socket_route_of(const struct sockaddr *address, socklen_t length, uint32_t *node) {
  struct vmmc_address read;
  uint32_t unused;
  if (length < (socklen_t)sizeof address->sa_family) return ROUTE_KERNEL;
  sa_family_t family;
  memcpy(&family, &address->sa_family, sizeof family);
  if (family != AF_INET && family != AF_INET6) return ROUTE_KERNEL;
  if (address_read(address, length, family, &read)) return ROUTE_KERNEL;
  return address_route(&read, node ? node : &unused);
}

bool address_is_local(const struct vmmc_address *address) {
  uint32_t own, nodes, node;
  if (!socket_place(&own, &nodes)) return false;
  if (address_is_wildcard(address) || address_is_loopback(address)) return true;
  return in_cluster(address, &node) && node == own;
}

bool socket_address_is_local(const struct sockaddr *address, socklen_t length) {
  struct vmmc_address read;
  if (length < (socklen_t)sizeof address->sa_family) return false;
  sa_family_t family;
  memcpy(&family, &address->sa_family, sizeof family);
  if ((family != AF_INET && family != AF_INET6) || address_read(address, length, family, &read)) return false;
  return address_is_local(&read);
}
