/*
 * names.c: the names and addresses of the cluster's nodes.
 *
 * node0 ... resolve to the nodes' addresses and back; the host's name is the node's; its interfaces are
 * loopback and the node's own.  All other names are the C library's to resolve.
 *
 * Programs that ask files instead of the C library (resolvers of their own, Open MPI) find the same there: who reads
 * or looks at one of them finds the cluster's in its place.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <net/if.h>
#include <net/if_arp.h>
#include <netinet/in.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>

#include "fault.h"
#include "names.h"
#include "process.h"
#include "real.h"
#include "socket.h"

/* Node i has 198.18.0.0 + i + 1 and fd00:766d:6d63::(i + 1). */
static struct in_addr address_of(uint32_t node) { return (struct in_addr){htonl(0xc6120000u + node + 1)}; }
static struct in6_addr address6_of(uint32_t node) {
  struct in6_addr a = {.s6_addr = {0xfd, 0x00, 0x76, 0x6d, 0x6d, 0x63}};
  a.s6_addr[14] = (uint8_t)((node + 1) >> 8);
  a.s6_addr[15] = (uint8_t)(node + 1);
  return a;
}

/* "node3", any case, with or without a final dot. */
static bool node_of_name(const char *name, uint32_t *node) {
  if (!process_on_node || !name || strncasecmp(name, "node", 4) || name[4] < '0' || name[4] > '9') return false;
  char *end;
  unsigned long number = strtoul(name + 4, &end, 10);
  if ((*end == '.' && end[1]) || (*end && *end != '.') || (name[4] == '0' && end - name > 5 && name[5] != '.')) return false;
  *node = (uint32_t)number;
  return number < process_nodes;
}

/* The node that has an address; not for loopback, whose name is localhost. */
static bool node_of_address(const void *bytes, int family, uint32_t *node, bool *in_cluster) {
  struct sockaddr_storage storage = {.ss_family = (sa_family_t)family};
  struct sockaddr_in *v4 = (void *)&storage;
  struct sockaddr_in6 *v6 = (void *)&storage;
  *in_cluster = false;
  if (!process_on_node) return false;
  if (family == AF_INET) {
    memcpy(&v4->sin_addr, bytes, sizeof v4->sin_addr);
    uint32_t ip = ntohl(v4->sin_addr.s_addr);
    if (ip >> 24 == 127 || ip == 0) return false;
  } else {
    memcpy(&v6->sin6_addr, bytes, sizeof v6->sin6_addr);
    if (IN6_IS_ADDR_LOOPBACK(&v6->sin6_addr) || IN6_IS_ADDR_UNSPECIFIED(&v6->sin6_addr)) return false;
    if (IN6_IS_ADDR_V4MAPPED(&v6->sin6_addr))
      return node_of_address(v6->sin6_addr.s6_addr + 12, AF_INET, node, in_cluster);
  }
  enum socket_route route =
      socket_route_of((struct sockaddr *)&storage, family == AF_INET ? sizeof *v4 : sizeof *v6, node);
  *in_cluster = route != ROUTE_KERNEL;
  return route == ROUTE_NODE;
}

static int name_of(uint32_t node, char *name, size_t size) { return snprintf(name, size, "node%u", node); }

/* ---- getaddrinfo, getnameinfo ---- */

INTERPOSE int getaddrinfo(const char *restrict name, const char *restrict service,
                          const struct addrinfo *restrict hints, struct addrinfo **restrict result) {
  uint32_t node;
  if (!node_of_name(name, &node) || (hints && hints->ai_flags & AI_NUMERICHOST))
    return REAL(getaddrinfo)(name, service, hints, result);
  /* The C library's own answers for the numbers, so that its freeaddrinfo frees them. */
  struct addrinfo asked = hints ? *hints : (struct addrinfo){.ai_flags = AI_V4MAPPED | AI_ADDRCONFIG};
  int family = asked.ai_family;
  bool canonical = asked.ai_flags & AI_CANONNAME;
  asked.ai_flags = (asked.ai_flags | AI_NUMERICHOST) & ~(AI_ADDRCONFIG | AI_CANONNAME | AI_V4MAPPED | AI_ALL);
  char text[INET6_ADDRSTRLEN];
  struct addrinfo *first = NULL, **end = &first;
  int error = EAI_FAMILY;
  for (int v6 = 0; v6 < 2; v6++) { /* IPv4 first, as the C library sorts a private IPv6 address behind it */
    struct in_addr a4 = address_of(node);
    struct in6_addr a6 = address6_of(node);
    asked.ai_family = v6 ? AF_INET6 : AF_INET;
    if (family != AF_UNSPEC && family != asked.ai_family) continue;
    inet_ntop(asked.ai_family, v6 ? (void *)&a6 : (void *)&a4, text, sizeof text);
    error = REAL(getaddrinfo)(text, service, &asked, end);
    if (error) break;
    while (*end) end = &(*end)->ai_next;
  }
  if (!error && canonical) {
    name_of(node, text, sizeof text);
    if (!(first->ai_canonname = strdup(text))) error = EAI_MEMORY;
  }
  if (error) {
    if (first) freeaddrinfo(first);
    return error;
  }
  *result = first;
  return 0;
}

INTERPOSE int getnameinfo(const struct sockaddr *restrict address, socklen_t length, char *restrict host,
                          socklen_t host_size, char *restrict service, socklen_t service_size, int flags) {
  uint32_t node;
  bool in_cluster = false, known = false;
  if (process_on_node && address && !(flags & NI_NUMERICHOST)) {
    if (address->sa_family == AF_INET && length >= sizeof(struct sockaddr_in))
      known = node_of_address(&((const struct sockaddr_in *)(const void *)address)->sin_addr, AF_INET, &node, &in_cluster);
    if (address->sa_family == AF_INET6 && length >= sizeof(struct sockaddr_in6))
      known = node_of_address(&((const struct sockaddr_in6 *)(const void *)address)->sin6_addr, AF_INET6, &node, &in_cluster);
  }
  if (in_cluster && !known) { /* no node's: no need to ask the world for it */
    if (flags & NI_NAMEREQD) return EAI_NONAME;
    flags |= NI_NUMERICHOST;
  }
  if (!known) return REAL(getnameinfo)(address, length, host, host_size, service, service_size, flags);
  if (host && host_size) {
    char name[32];
    if ((socklen_t)name_of(node, name, sizeof name) >= host_size) return EAI_OVERFLOW;
    strcpy(host, name);
  }
  if (!service || !service_size) return host && host_size ? 0 : EAI_NONAME;
  return REAL(getnameinfo)(address, length, NULL, 0, service, service_size, flags);
}

/* ---- gethostbyname and its like ---- */

/* Fills in the answer for a node, with all that it points to in `buffer`. 0 or ERANGE. */
static int fill(struct hostent *entry, char *buffer, size_t size, uint32_t node, int family) {
  struct parts {
    char *aliases[1];
    char *addresses[2];
    union {
      struct in_addr v4;
      struct in6_addr v6;
    } address;
    char name[16];
  };
  size_t skip = -(uintptr_t)buffer % _Alignof(struct parts);
  if (size < skip + sizeof(struct parts)) return ERANGE;
  struct parts *parts = (void *)(buffer + skip);
  memset(parts, 0, sizeof *parts);
  name_of(node, parts->name, sizeof parts->name);
  if (family == AF_INET) parts->address.v4 = address_of(node);
  else parts->address.v6 = address6_of(node);
  parts->addresses[0] = (char *)&parts->address;
  *entry = (struct hostent){.h_name = parts->name, .h_aliases = parts->aliases, .h_addrtype = family,
                            .h_length = family == AF_INET ? 4 : 16, .h_addr_list = parts->addresses};
  return 0;
}

static struct hostent shared_entry; /* what the functions without _r return, as the C library does */
static char shared_buffer[256];

static struct hostent *shared(uint32_t node, int family) {
  fill(&shared_entry, shared_buffer, sizeof shared_buffer, node, family);
  return &shared_entry;
}

static int reentrant(struct hostent *entry, char *buffer, size_t size, struct hostent **result, int *error,
                     uint32_t node, int family) {
  int status = fill(entry, buffer, size, node, family);
  *result = status ? NULL : entry;
  if (status) *error = NETDB_INTERNAL;
  return status;
}

INTERPOSE struct hostent *gethostbyname(const char *name) {
  uint32_t node;
  return node_of_name(name, &node) ? shared(node, AF_INET) : REAL(gethostbyname)(name);
}
INTERPOSE struct hostent *gethostbyname2(const char *name, int family) {
  uint32_t node;
  if ((family == AF_INET || family == AF_INET6) && node_of_name(name, &node)) return shared(node, family);
  return REAL(gethostbyname2)(name, family);
}
INTERPOSE int gethostbyname_r(const char *restrict name, struct hostent *restrict entry, char *restrict buffer,
                              size_t size, struct hostent **restrict result, int *restrict error) {
  uint32_t node;
  if (node_of_name(name, &node)) return reentrant(entry, buffer, size, result, error, node, AF_INET);
  return REAL(gethostbyname_r)(name, entry, buffer, size, result, error);
}
INTERPOSE int gethostbyname2_r(const char *restrict name, int family, struct hostent *restrict entry,
                               char *restrict buffer, size_t size, struct hostent **restrict result,
                               int *restrict error) {
  uint32_t node;
  if ((family == AF_INET || family == AF_INET6) && node_of_name(name, &node))
    return reentrant(entry, buffer, size, result, error, node, family);
  return REAL(gethostbyname2_r)(name, family, entry, buffer, size, result, error);
}

static bool address_fits(const void *address, socklen_t length, int family) {
  return address && ((family == AF_INET && length == 4) || (family == AF_INET6 && length == 16));
}
INTERPOSE struct hostent *gethostbyaddr(const void *address, socklen_t length, int family) {
  uint32_t node;
  bool in_cluster;
  if (!address_fits(address, length, family) || !node_of_address(address, family, &node, &in_cluster))
    return REAL(gethostbyaddr)(address, length, family);
  return shared(node, family);
}
INTERPOSE int gethostbyaddr_r(const void *restrict address, socklen_t length, int family,
                              struct hostent *restrict entry, char *restrict buffer, size_t size,
                              struct hostent **restrict result, int *restrict error) {
  uint32_t node;
  bool in_cluster;
  if (!address_fits(address, length, family) || !node_of_address(address, family, &node, &in_cluster))
    return REAL(gethostbyaddr_r)(address, length, family, entry, buffer, size, result, error);
  return reentrant(entry, buffer, size, result, error, node, family);
}

/* ---- this node ---- */

INTERPOSE int gethostname(char *name, size_t size) {
  if (!process_on_node) return REAL(gethostname)(name, size);
  char own[32];
  size_t length = (size_t)name_of(process_node, own, sizeof own) + 1;
  memcpy(name, own, length < size ? length : size);
  if (length <= size) return 0;
  errno = ENAMETOOLONG;
  return -1;
}
INTERPOSE int __gethostname_chk(char *name, size_t length, size_t size) {
  if (length > size) __chk_fail();
  return gethostname(name, length);
}

/* A node's name is the cluster's to give; and not even root on a node renames the machine under it. */
INTERPOSE int sethostname(const char *name, size_t length) {
  if (!process_on_node) return REAL(sethostname)(name, length);
  errno = EPERM;
  return -1;
}

INTERPOSE int uname(struct utsname *system) {
  int result = REAL(uname)(system);
  if (result == 0 && process_on_node) {
    memset(system->nodename, 0, sizeof system->nodename);
    name_of(process_node, system->nodename, sizeof system->nodename);
  }
  return result;
}

void names_own_address(struct sockaddr *address) {
  struct sockaddr_in *v4 = (void *)address;
  struct sockaddr_in6 *v6 = (void *)address;
  struct in_addr own = address_of(process_node);
  if (address->sa_family == AF_INET) v4->sin_addr = own;
  else if (IN6_IS_ADDR_V4MAPPED(&v6->sin6_addr)) memcpy(v6->sin6_addr.s6_addr + 12, &own, sizeof own);
  else v6->sin6_addr = address6_of(process_node), v6->sin6_scope_id = 0;
}

/* ---- this node's interfaces ---- */

enum { INTERFACES = 2 };
static const struct interface {
  char name[IFNAMSIZ];
  short flags;
  unsigned short hardware; /* ARPHRD_* */
} interfaces[INTERFACES] = {{"lo", IFF_UP | IFF_RUNNING | IFF_LOOPBACK, ARPHRD_LOOPBACK},
                            {"vmmc0", IFF_UP | IFF_RUNNING, ARPHRD_NONE}}; /* index 1 and 2, as the kernel counts */

static struct sockaddr_in interface_address(int i) {
  struct in_addr address = i ? address_of(process_node) : (struct in_addr){htonl(INADDR_LOOPBACK)};
  return (struct sockaddr_in){.sin_family = AF_INET, .sin_addr = address};
}
static struct sockaddr_in interface_mask(int i) {
  return (struct sockaddr_in){.sin_family = AF_INET, .sin_addr = {htonl(i ? 0xfffe0000u : 0xff000000u)}};
}

/* One block, as the C library makes it: its freeifaddrs is a free(). */
INTERPOSE int getifaddrs(struct ifaddrs **result) {
  if (!process_on_node) return REAL(getifaddrs)(result);
  enum { COUNT = 2 * INTERFACES };
  struct block {
    struct ifaddrs list[COUNT];
    union {
      struct sockaddr any;
      struct sockaddr_in v4;
      struct sockaddr_in6 v6;
    } address[COUNT], mask[COUNT];
    char names[INTERFACES][IFNAMSIZ];
  } *b = calloc(1, sizeof *b);
  if (!b) {
    errno = ENOMEM;
    return -1;
  }
  for (int i = 0; i < INTERFACES; i++) memcpy(b->names[i], interfaces[i].name, IFNAMSIZ);
  for (int i = 0; i < COUNT; i++) {
    bool own = i % INTERFACES, v6 = i >= INTERFACES;
    b->list[i] = (struct ifaddrs){.ifa_next = i + 1 < COUNT ? &b->list[i + 1] : NULL,
                                  .ifa_name = b->names[own],
                                  .ifa_flags = (unsigned)interfaces[own].flags,
                                  .ifa_addr = &b->address[i].any, .ifa_netmask = &b->mask[i].any};
    if (v6) {
      b->address[i].v6 = (struct sockaddr_in6){.sin6_family = AF_INET6,
                                               .sin6_addr = own ? address6_of(process_node) : in6addr_loopback};
      b->mask[i].v6.sin6_family = AF_INET6;
      memset(&b->mask[i].v6.sin6_addr, 0xff, own ? 8 : 16);
    } else {
      b->address[i].v4 = interface_address(own);
      b->mask[i].v4 = interface_mask(own);
    }
  }
  *result = b->list;
  return 0;
}

static int interface_named(const char *name) { /* its place in the table, or -1 */
  for (int i = 0; i < INTERFACES; i++)
    if (!strncmp(name, interfaces[i].name, IFNAMSIZ)) return i;
  return -1;
}

INTERPOSE unsigned if_nametoindex(const char *name) {
  if (!process_on_node) return REAL(if_nametoindex)(name);
  int i = interface_named(name);
  if (i < 0) errno = ENODEV;
  return (unsigned)(i + 1);
}

INTERPOSE char *if_indextoname(unsigned index, char name[IFNAMSIZ]) {
  if (!process_on_node) return REAL(if_indextoname)(index, name);
  if (index >= 1 && index <= INTERFACES) return memcpy(name, interfaces[index - 1].name, IFNAMSIZ);
  errno = ENXIO;
  return NULL;
}

/* Made of the pieces that the C library's if_freenameindex frees. */
INTERPOSE struct if_nameindex *if_nameindex(void) {
  if (!process_on_node) return REAL(if_nameindex)();
  struct if_nameindex *list = calloc(INTERFACES + 1, sizeof *list);
  for (unsigned i = 0; list && i < INTERFACES; i++) {
    list[i] = (struct if_nameindex){i + 1, strdup(interfaces[i].name)};
    if (list[i].if_name) continue;
    if_freenameindex(list);
    list = NULL;
  }
  if (!list) errno = ENOBUFS;
  return list;
}

static int list_interfaces(struct ifconf *given) {
  struct ifconf room;
  if (!fault_copy(&room, given, sizeof room)) return -EFAULT;
  struct ifreq all[INTERFACES] = {0};
  int length = sizeof all;
  if (room.ifc_buf) { /* as many as fit */
    if (room.ifc_len < length) length = room.ifc_len / (int)sizeof *all * (int)sizeof *all;
    for (int i = 0; i < INTERFACES; i++) {
      struct sockaddr_in address = interface_address(i);
      memcpy(all[i].ifr_name, interfaces[i].name, IFNAMSIZ);
      memcpy(&all[i].ifr_addr, &address, sizeof address);
    }
    if (length > 0 && !fault_copy(room.ifc_buf, all, (size_t)length)) return -EFAULT;
  }
  return fault_copy(&given->ifc_len, &length, sizeof length) ? 0 : -EFAULT;
}

int names_ioctl(unsigned long request, void *argument) {
  struct ifreq asked;
  struct sockaddr_in address;
  switch (request) {
    case SIOCGIFCONF: return list_interfaces(argument);
    case SIOCGIFNAME:
    case SIOCGIFINDEX:
    case SIOCGIFFLAGS:
    case SIOCGIFADDR:
    case SIOCGIFNETMASK:
    case SIOCGIFHWADDR:
    case SIOCGIFMTU:
    case SIOCGIFMETRIC: break;
    default: return -ENOTTY;
  }
  if (!fault_copy(&asked, argument, sizeof asked)) return -EFAULT;
  int i = request == SIOCGIFNAME ? asked.ifr_ifindex - 1 : interface_named(asked.ifr_name);
  if (i < 0 || i >= INTERFACES) return -ENODEV;
  memset(&asked.ifr_ifru, 0, sizeof asked.ifr_ifru);
  switch (request) {
    case SIOCGIFNAME: /* the number stays */
      asked.ifr_ifindex = i + 1;
      memcpy(asked.ifr_name, interfaces[i].name, IFNAMSIZ);
      break;
    case SIOCGIFINDEX: asked.ifr_ifindex = i + 1; break;
    case SIOCGIFFLAGS: asked.ifr_flags = interfaces[i].flags; break;
    case SIOCGIFADDR:
    case SIOCGIFNETMASK:
      address = request == SIOCGIFADDR ? interface_address(i) : interface_mask(i);
      memcpy(&asked.ifr_addr, &address, sizeof address);
      break;
    case SIOCGIFHWADDR: asked.ifr_hwaddr.sa_family = interfaces[i].hardware; break;
    case SIOCGIFMTU: asked.ifr_mtu = 65536; break;
  }
  return fault_copy(argument, &asked, sizeof asked) ? 0 : -EFAULT;
}

/* ---- files that say the same ---- */

/* What stands for a file of the machine: nodes/files.py writes it beside the daemon's socket. */
static struct told_file {
  const char *path;
  char copy[128]; /* longer than a Unix socket's path and a name */
} told_files[] = {{.path = "/etc/hosts"}, {.path = "/proc/net/if_inet6"}, {.path = "/proc/self/net/if_inet6"}};
enum { TOLD_FILES = sizeof told_files / sizeof *told_files };

void names_begin(const char *socket) {
  const char *slash = strrchr(socket, '/');
  int directory = slash ? (int)(slash - socket) : 0;
  for (int i = 0; i < TOLD_FILES && directory; i++) {
    char own[32] = "hosts";
    if (i) snprintf(own, sizeof own, "node%u.if_inet6", process_node);
    int length = snprintf(told_files[i].copy, sizeof told_files[i].copy, "%.*s/%s", directory, socket, own);
    if (length >= (int)sizeof told_files[i].copy) told_files[i].copy[0] = 0;
  }
}

struct sought_file {
  const char *path; /* the program's: it may be no address */
  const struct told_file *found;
};

static void seek_file(void *context) {
  struct sought_file *sought = context;
  for (int i = 0; !sought->found && i < TOLD_FILES; i++) {
    const char *a = sought->path, *b = told_files[i].path;
    while (*a && *a == *b) a++, b++;
    if (*a == *b) sought->found = &told_files[i];
  }
}

const char *names_file(const char *path) {
  struct sought_file sought = {path, NULL};
  if (!process_on_node || !fault_guard(seek_file, &sought) || !sought.found) return path;
  const char *copy = sought.found->copy;
  /* Where it is gone, or another user's now, the machine's is better than none. */
  return copy[0] && REAL(syscall)(SYS_faccessat, AT_FDCWD, copy, R_OK) == 0 ? copy : path;
}

const char *names_opened(const char *path, int flags) {
  return (flags & O_ACCMODE) == O_RDONLY && !(flags & O_TRUNC) ? names_file(path) : path;
}

#define STAT(name, parameters, arguments) \
  INTERPOSE int name parameters { return REAL(name) arguments; }
STAT(stat, (const char *path, struct stat *status), (names_file(path), status))
STAT(stat64, (const char *path, struct stat64 *status), (names_file(path), status))
STAT(lstat, (const char *path, struct stat *status), (names_file(path), status))
STAT(lstat64, (const char *path, struct stat64 *status), (names_file(path), status))
STAT(fstatat, (int at, const char *path, struct stat *status, int flags), (at, names_file(path), status, flags))
STAT(fstatat64, (int at, const char *path, struct stat64 *status, int flags), (at, names_file(path), status, flags))
STAT(statx, (int at, const char *path, int flags, unsigned mask, struct statx *status),
     (at, names_file(path), flags, mask, status))
