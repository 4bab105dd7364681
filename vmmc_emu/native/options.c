/*
 * options.c: what programs ask of and tell a socket: options, names, ioctl.
 *
 * An option either does something here, or is kept and given back: programs set many that have no
 * meaning without a kernel's TCP (TCP_NODELAY: nothing is ever held back) and fail when they cannot.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/sockios.h>
#include <netinet/in.h>
#include <netinet/ip.h>
#include <netinet/tcp.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/time.h>

#include "address.h"
#include "connection.h"
#include "slot.h"
#include "sys.h"

/* Linux's, where libc's headers may lack them. */
enum {
  OPTION_TCP_NOTSENT_LOWAT = 25,
  OPTION_TCP_FASTOPEN_CONNECT = 30,
  OPTION_SO_RCVTIMEO_NEW = 66,
  OPTION_SO_SNDTIMEO_NEW = 67,
};

enum {
  BUFFER_MAX = 212992,            /* net.core.rmem_max and wmem_max, where the kernel's cannot be read */
  RECEIVE_BUFFER_DEFAULT = 131072, /* as getsockopt shows it: net.ipv4.tcp_rmem */
  SEND_BUFFER_DEFAULT = 2626560,  /* a connected loopback socket's */
  RECEIVE_BUFFER_MIN = 2304,
  SEND_BUFFER_MIN = 4608,
  SEGMENT = 65483,                /* TCP_MAXSEG over Linux's loopback */
  SEGMENT_UNCONNECTED = 536,
  SEGMENT_LEAST = 88,             /* that TCP_MAXSEG may ask for, and the most */
  SEGMENT_MOST = 32767,
};

#define BOOLEAN INT32_MAX, INT32_MIN
#define ANY INT32_MIN, INT32_MAX

/* Options that are kept and given back: vsocket.kept[i] holds the difference from the default. */
static const struct kept_option {
  int level, name;
  int32_t value;     /* the default */
  int32_t low, high; /* what is granted; BOOLEAN: any number, and all but 0 is kept as 1 */
  enum {
    PLAIN = 0,
    NEGATIVE = 1, /* -1 is granted as well, and means the default */
    EARLY = 2,    /* not once connected */
    CLASS = 4,    /* one byte, whose last two bits are the protocol's */
    UNKEPT = 8,   /* granted, and no more */
  } kind;
} kept_options[] = {
  { SOL_SOCKET, SO_KEEPALIVE, 0, BOOLEAN, PLAIN },
  { SOL_SOCKET, SO_BROADCAST, 0, BOOLEAN, PLAIN },
  { SOL_SOCKET, SO_DONTROUTE, 0, BOOLEAN, PLAIN },
  { SOL_SOCKET, SO_OOBINLINE, 0, BOOLEAN, PLAIN },
  { SOL_SOCKET, SO_PRIORITY, 0, ANY, PLAIN },
  { SOL_SOCKET, SO_TIMESTAMP, 0, BOOLEAN, PLAIN },
  { SOL_SOCKET, SO_TIMESTAMPNS, 0, BOOLEAN, PLAIN },
  { SOL_SOCKET, SO_DEBUG, 0, BOOLEAN, PLAIN },
  { SOL_SOCKET, SO_MARK, 0, ANY, PLAIN },
  { SOL_SOCKET, SO_NO_CHECK, 0, BOOLEAN, PLAIN },
  { SOL_SOCKET, SO_RXQ_OVFL, 0, BOOLEAN, PLAIN },
  { IPPROTO_TCP, TCP_NODELAY, 0, BOOLEAN, PLAIN },
  { IPPROTO_TCP, TCP_CORK, 0, BOOLEAN, PLAIN },
  { IPPROTO_TCP, TCP_KEEPIDLE, 7200, 1, 32767, PLAIN },
  { IPPROTO_TCP, TCP_KEEPINTVL, 75, 1, 32767, PLAIN },
  { IPPROTO_TCP, TCP_KEEPCNT, 9, 1, 127, PLAIN },
  { IPPROTO_TCP, TCP_SYNCNT, 6, 1, 127, PLAIN },
  { IPPROTO_TCP, TCP_LINGER2, 60, ANY, PLAIN },
  { IPPROTO_TCP, TCP_DEFER_ACCEPT, 0, ANY, PLAIN },
  { IPPROTO_TCP, TCP_QUICKACK, 1, BOOLEAN, PLAIN },
  { IPPROTO_TCP, TCP_USER_TIMEOUT, 0, 0, INT32_MAX, PLAIN },
  { IPPROTO_TCP, TCP_FASTOPEN, 0, 0, INT32_MAX, EARLY },
  { IPPROTO_TCP, OPTION_TCP_FASTOPEN_CONNECT, 0, 0, 1, EARLY },
  { IPPROTO_TCP, OPTION_TCP_NOTSENT_LOWAT, 0, ANY, PLAIN },
  { IPPROTO_TCP, TCP_THIN_LINEAR_TIMEOUTS, 0, 0, 1, PLAIN },
  { IPPROTO_TCP, TCP_THIN_DUPACK, 0, 0, 1, UNKEPT },
  { IPPROTO_IP, IP_TOS, 0, ANY, CLASS },
  { IPPROTO_IP, IP_TTL, 64, 1, 255, NEGATIVE },
  { IPPROTO_IP, IP_MTU_DISCOVER, IP_PMTUDISC_WANT, IP_PMTUDISC_DONT, IP_PMTUDISC_OMIT, PLAIN },
  { IPPROTO_IP, IP_RECVERR, 0, BOOLEAN, PLAIN },
  { IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 0, BOOLEAN, PLAIN },
  { IPPROTO_IP, IP_FREEBIND, 0, BOOLEAN, PLAIN },
  { IPPROTO_IP, IP_MINTTL, 0, 0, 255, PLAIN },
  { IPPROTO_IP, IP_PKTINFO, 0, BOOLEAN, PLAIN },
  { IPPROTO_IP, IP_RECVOPTS, 0, BOOLEAN, PLAIN },
  { IPPROTO_IP, IP_RECVTOS, 0, BOOLEAN, PLAIN },
  { IPPROTO_IP, IP_RECVTTL, 0, BOOLEAN, PLAIN },
  { IPPROTO_IP, IP_TRANSPARENT, 0, BOOLEAN, PLAIN },
  { IPPROTO_IPV6, IPV6_TCLASS, 0, 0, 255, NEGATIVE | CLASS },
  { IPPROTO_IPV6, IPV6_UNICAST_HOPS, 64, 0, 255, NEGATIVE },
  { IPPROTO_IPV6, IPV6_RECVERR, 0, BOOLEAN, PLAIN },
  { IPPROTO_IPV6, IPV6_MTU_DISCOVER, IPV6_PMTUDISC_WANT, IPV6_PMTUDISC_DONT, IPV6_PMTUDISC_OMIT, PLAIN },
  { IPPROTO_IPV6, IPV6_DONTFRAG, 0, BOOLEAN, PLAIN },
  { IPPROTO_IPV6, IPV6_MINHOPCOUNT, 0, 0, 255, PLAIN },
  { IPPROTO_IPV6, IPV6_RECVHOPLIMIT, 0, BOOLEAN, PLAIN },
  { IPPROTO_IPV6, IPV6_RECVPKTINFO, 0, BOOLEAN, PLAIN },
  { IPPROTO_IPV6, IPV6_RECVTCLASS, 0, BOOLEAN, PLAIN },
};
enum { KEPT_OPTIONS = sizeof kept_options / sizeof *kept_options };
_Static_assert(KEPT_OPTIONS <= sizeof((struct vsocket *)0)->kept / sizeof(int32_t),
               "every kept option has its place in the socket");

static int kept_index(const struct vsocket *s, int level, int name) {
  if (level == IPPROTO_IPV6 && s->family != AF_INET6) return -1;
  /* Of these a socket has one, by two names. */
  if (level == IPPROTO_IPV6 && name == IPV6_FREEBIND) level = IPPROTO_IP, name = IP_FREEBIND;
  if (level == IPPROTO_IPV6 && name == IPV6_TRANSPARENT) level = IPPROTO_IP, name = IP_TRANSPARENT;
  for (int i = 0; i < KEPT_OPTIONS; i++)
    if (kept_options[i].level == level && kept_options[i].name == name) return i;
  return -1;
}

/* ---- values as the interface carries them ---- */

static int take_int(const void *value, socklen_t length, int *number) {
  if (length < (socklen_t)sizeof *number) return -EINVAL;
  memcpy(number, value, sizeof *number);
  return 0;
}

static int give(const void *from, socklen_t size, void *value, socklen_t *length) {
  if ((int32_t)*length < 0) return -EINVAL;
  if (*length > size) *length = size;
  memcpy(value, from, *length);
  return 0;
}

static int give_int(int number, void *value, socklen_t *length) {
  return give(&number, sizeof number, value, length);
}

/* struct timeval and the 64-bit time of SO_RCVTIMEO_NEW are the same on 64-bit machines. */
static int take_timeout(const void *value, socklen_t length, uint64_t *ns) {
  struct timeval t;
  if (length < (socklen_t)sizeof t) return -EINVAL;
  memcpy(&t, value, sizeof t);
  if (t.tv_usec < 0 || t.tv_usec >= 1000000) return -EDOM;
  if (t.tv_sec < 0) {
    *ns = 1; /* Linux: no waiting at all */
    return 0;
  }
  /* Longer than a hundred years is for ever. */
  if ((uint64_t)t.tv_sec > UINT64_MAX / 2000000000u)
    *ns = 0;
  else
    *ns = (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_usec * 1000;
  return 0;
}

static int give_timeout(uint64_t ns, void *value, socklen_t *length) {
  struct timeval t = { (time_t)(ns / 1000000000u), (suseconds_t)(ns % 1000000000u / 1000) };
  return give(&t, sizeof t, value, length);
}

/* ---- names ---- */

int socket_name(struct vsocket *s, bool peer, struct sockaddr *address, socklen_t *length) {
  if ((int32_t)*length < 0) return -EINVAL;
  if (!connection_usable(s)) return -EBADF;
  if (peer) {
    struct connection_view view = connection_view(s);
    if (!view.connected || connection_over(s)) return -ENOTCONN;
    address_write(&s->peer, s->family, address, length);
  } else {
    address_write(&s->local, s->family, address, length);
  }
  return 0;
}

/* ---- setsockopt ---- */

static void set_bit(uint32_t *flags, uint32_t bit, bool on) { *flags = on ? *flags | bit : *flags & ~bit; }

/* The kernel's own bound for a buffer, as the machine has it set. */
static int buffer_max(const char *path) {
  char text[16] = "";
  int fd = (int)sys_call(SYS_openat, AT_FDCWD, (long)path, O_RDONLY | O_CLOEXEC, 0, 0, 0);
  if (fd < 0) return BUFFER_MAX;
  long n = sys_call(SYS_read, fd, (long)text, sizeof text - 1, 0, 0, 0);
  sys_close(fd);
  int bytes = n > 0 ? atoi(text) : 0;
  return bytes > 0 ? bytes : BUFFER_MAX;
}

static int set_receive_buffer(struct vsocket *s, int bytes) {
  int most = buffer_max("/proc/sys/net/core/rmem_max");
  if (bytes < 0 || bytes > most) bytes = most; /* unsigned, as Linux takes it */
  if (bytes < RECEIVE_BUFFER_MIN / 2) bytes = RECEIVE_BUFFER_MIN / 2;
  s->receive_buffer = (uint32_t)bytes;
  struct vmmc_app_slot *a = slot_hold(s);
  if (a) atomic_store_explicit(&a->receive_window, s->receive_buffer, memory_order_relaxed);
  slot_let_go(s);
  return 0;
}

static int set_send_buffer(struct vsocket *s, int bytes) {
  int most = buffer_max("/proc/sys/net/core/wmem_max");
  if (bytes < 0 || bytes > most) bytes = most;
  s->send_buffer = bytes < SEND_BUFFER_MIN / 2 ? SEND_BUFFER_MIN / 2 : (uint32_t)bytes;
  struct vmmc_app_slot *a = slot_hold(s);
  if (a) atomic_store_explicit(&a->send_window, s->send_buffer, memory_order_relaxed);
  slot_let_go(s);
  /* What is on its way was to be acknowledged in steps of the window that was. */
  connection_unacknowledged(s);
  connection_wake_local(s); /* writers, who may have room now */
  return 0;
}

static int set_linger(struct vsocket *s, const void *value, socklen_t length) {
  struct linger linger;
  if (length < (socklen_t)sizeof linger) return -EINVAL;
  memcpy(&linger, value, sizeof linger);
  s->linger_s = !linger.l_onoff ? -1 : linger.l_linger < 0 ? INT32_MAX : linger.l_linger;
  if (!s->generation || !connection_usable(s)) return 0; /* what takes a slot for it says so there */
  _Atomic uint32_t *shut = &app_slot(s->endpoint, s->slot)->shut;
  if (s->linger_s == 0) atomic_fetch_or(shut, VMMC_ABORT_AT_END);
  else atomic_fetch_and(shut, ~(uint32_t)VMMC_ABORT_AT_END);
  return 0;
}

static int set_socket_level(struct vsocket *s, int name, const void *value, socklen_t length) {
  int number;
  if (name == SO_LINGER) return set_linger(s, value, length);
  if (name == SO_RCVTIMEO || name == OPTION_SO_RCVTIMEO_NEW)
    return take_timeout(value, length, &s->receive_timeout_ns);
  if (name == SO_SNDTIMEO || name == OPTION_SO_SNDTIMEO_NEW)
    return take_timeout(value, length, &s->send_timeout_ns);
  int error = take_int(value, length, &number);
  if (error) return error;
  switch (name) {
    case SO_REUSEADDR: set_bit(&s->bind_flags, VMMC_BIND_REUSEADDR, number); return 0;
    case SO_REUSEPORT: set_bit(&s->bind_flags, VMMC_BIND_REUSEPORT, number); return 0;
    case SO_RCVBUF:
    case SO_RCVBUFFORCE: return set_receive_buffer(s, number);
    case SO_SNDBUF:
    case SO_SNDBUFFORCE: return set_send_buffer(s, number);
    case SO_RCVLOWAT: s->low_water = number < 0 ? INT32_MAX : number ? (uint32_t)number : 1; return 0;
    case SO_TYPE:
    case SO_DOMAIN:
    case SO_PROTOCOL:
    case SO_ERROR:
    case SO_ACCEPTCONN:
    case SO_SNDLOWAT: return -ENOPROTOOPT; /* not to be set */
    default: return -ENOPROTOOPT;
  }
}

static int set_v6only(struct vsocket *s, const void *value, socklen_t length) {
  if (s->family != AF_INET6) return -ENOPROTOOPT;
  int number, error = take_int(value, length, &number);
  if (error) return error;
  if (s->bound || s->phase != SOCKET_NEW) return -EINVAL;
  set_bit(&s->bind_flags, VMMC_BIND_V6ONLY, number);
  return 0;
}

static uint32_t kept(const struct vsocket *s, int level, int name) {
  int index = kept_index(s, level, name);
  return (uint32_t)kept_options[index].value + (uint32_t)s->kept[index];
}

uint64_t socket_keepalive(const struct vsocket *s) {
  if (!kept(s, SOL_SOCKET, SO_KEEPALIVE)) return 0;
  return VMMC_KEEPALIVE(kept(s, IPPROTO_TCP, TCP_KEEPIDLE), kept(s, IPPROTO_TCP, TCP_KEEPINTVL),
                        kept(s, IPPROTO_TCP, TCP_KEEPCNT));
}

/* Tells the NIC, when what was set is about that. */
static void tell_keepalive(struct vsocket *s) {
  struct vmmc_app_slot *a = slot_hold(s);
  uint64_t wanted = socket_keepalive(s);
  if (a && atomic_load_explicit(&a->keepalive, memory_order_relaxed) != wanted) {
    atomic_store_explicit(&a->keepalive, wanted, memory_order_relaxed); /* ordered by the ring */
    endpoint_ring_slot(s->endpoint, s->slot);
  }
  slot_let_go(s);
}

/* What TCP_CONGESTION gives where no name was set: there is no such control, the link has its own. */
static const char no_congestion[16] = "vmmc"; /* TCP_CA_NAME_MAX */

/* A name that the machine's kernel would take is kept, and given back: a socket of the kernel's is asked. */
static int set_congestion(struct vsocket *s, const void *value, socklen_t length) {
  char name[sizeof s->congestion] = "";
  if (length < 1) return -EINVAL;
  memcpy(name, value, length < sizeof name - 1 ? length : sizeof name - 1);
  if (strcmp(name, no_congestion) != 0) {
    int fd = sys_socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0) return fd;
    int error = sys_setsockopt(fd, IPPROTO_TCP, TCP_CONGESTION, name, sizeof name);
    sys_close(fd);
    if (error) return error;
  }
  strcpy(s->congestion, name);
  return 0;
}

int socket_setsockopt(struct vsocket *s, int level, int name, const void *value, socklen_t length) {
  if (!connection_usable(s)) return -EBADF;
  if ((int32_t)length < 0) return -EINVAL;
  int index = kept_index(s, level, name);
  if (index >= 0) {
    int number = 0;
    /* Linux takes options of the IP level as one byte, too, or as none. */
    if (level == IPPROTO_IP && length < (socklen_t)sizeof number)
      number = length ? *(const unsigned char *)value : 0;
    else if (take_int(value, length, &number))
      return -EINVAL;
    const struct kept_option *option = &kept_options[index];
    if (option->low > option->high) number = number != 0;
    else if (option->kind & NEGATIVE && number == -1) number = option->value;
    else if (number < option->low || number > option->high) return -EINVAL;
    if (option->kind & EARLY && s->phase >= SOCKET_CONNECTING && !connection_over(s)) return -EINVAL;
    if (option->kind & CLASS) number &= 0xff & ~IPTOS_ECN_MASK;
    if (option->kind & UNKEPT) number = option->value;
    s->kept[index] = (int32_t)((uint32_t)number - (uint32_t)option->value);
    tell_keepalive(s);
    return 0;
  }
  switch (level) {
    case SOL_SOCKET: return set_socket_level(s, name, value, length);
    case IPPROTO_IPV6: return name == IPV6_V6ONLY ? set_v6only(s, value, length) : -ENOPROTOOPT;
    case IPPROTO_TCP: {
      if (name == TCP_CONGESTION) return set_congestion(s, value, length);
      int number, error = take_int(value, length, &number);
      if (error) return error;
      if (name == TCP_MAXSEG && number && (number < SEGMENT_LEAST || number > SEGMENT_MOST)) return -EINVAL;
      if (name == TCP_MAXSEG || name == TCP_WINDOW_CLAMP) return 0; /* the link has its own sizes */
      return -ENOPROTOOPT;
    }
    default: return -ENOPROTOOPT;
  }
}

/* ---- getsockopt ---- */

static int get_tcp_info(struct vsocket *s, void *value, socklen_t *length) {
  /* TCP's state numbers; 0 congestion state: open */
  struct tcp_info info = { .tcpi_snd_mss = SEGMENT, .tcpi_rcv_mss = SEGMENT, .tcpi_advmss = SEGMENT,
                           .tcpi_pmtu = 65535, .tcpi_rto = 200000, .tcpi_rtt = 20, .tcpi_rttvar = 5,
                           .tcpi_snd_ssthresh = 0x7fffffff, .tcpi_snd_cwnd = 10, .tcpi_reordering = 3,
                           .tcpi_rcv_space = VMMC_RING };
  struct connection_view view = connection_view(s);
  uint32_t shut = atomic_load(&s->shut);
  bool ended = view.status & VMMC_END_OF_FILE;
  if (s->phase == SOCKET_LISTENING) {
    info.tcpi_state = TCP_LISTEN;
    info.tcpi_unacked = (uint32_t)(connection_accepts_waiting(s) / sizeof(struct vmmc_accept_entry));
  } else if (view.connecting) {
    info.tcpi_state = TCP_SYN_SENT;
  } else if (!view.connected || connection_over(s)) {
    info.tcpi_state = TCP_CLOSE;
  } else if (shut & VMMC_SHUT_WRITE) {
    info.tcpi_state = ended ? TCP_LAST_ACK : TCP_FIN_WAIT2;
  } else {
    info.tcpi_state = ended ? TCP_CLOSE_WAIT : TCP_ESTABLISHED;
  }
  return give(&info, sizeof info, value, length);
}

static int get_socket_level(struct vsocket *s, int name, void *value, socklen_t *length) {
  switch (name) {
    case SO_ERROR: return give_int(connection_take_error(s), value, length);
    case SO_TYPE: return give_int(SOCK_STREAM, value, length);
    case SO_DOMAIN: return give_int(s->family, value, length);
    case SO_PROTOCOL: return give_int(IPPROTO_TCP, value, length);
    case SO_ACCEPTCONN: return give_int(atomic_load(&s->phase) == SOCKET_LISTENING, value, length);
    case SO_REUSEADDR: return give_int((s->bind_flags & VMMC_BIND_REUSEADDR) != 0, value, length);
    case SO_REUSEPORT: return give_int((s->bind_flags & VMMC_BIND_REUSEPORT) != 0, value, length);
    /* Linux counts its own overhead: what it tells is twice what it was told. */
    case SO_RCVBUF:
      return give_int(s->receive_buffer ? (int)s->receive_buffer * 2 : RECEIVE_BUFFER_DEFAULT, value, length);
    case SO_SNDBUF:
      return give_int(s->send_buffer ? (int)s->send_buffer * 2 : SEND_BUFFER_DEFAULT, value, length);
    case SO_RCVLOWAT: return give_int((int)s->low_water, value, length);
    case SO_SNDLOWAT: return give_int(1, value, length);
    case SO_RCVTIMEO:
    case OPTION_SO_RCVTIMEO_NEW: return give_timeout(s->receive_timeout_ns, value, length);
    case SO_SNDTIMEO:
    case OPTION_SO_SNDTIMEO_NEW: return give_timeout(s->send_timeout_ns, value, length);
    case SO_LINGER: {
      struct linger linger = { s->linger_s >= 0, s->linger_s >= 0 ? s->linger_s : 0 };
      return give(&linger, sizeof linger, value, length);
    }
    case SO_PEERCRED: { /* as for any TCP socket: not known */
      struct ucred nobody = { 0, (uid_t)-1, (gid_t)-1 };
      return give(&nobody, sizeof nobody, value, length);
    }
    default: return -ENOPROTOOPT;
  }
}

static int get_tcp_level(struct vsocket *s, int name, void *value, socklen_t *length) {
  switch (name) {
    case TCP_MAXSEG:
      return give_int(connection_view(s).connected ? SEGMENT : SEGMENT_UNCONNECTED, value, length);
    case TCP_WINDOW_CLAMP: return give_int(VMMC_RING, value, length);
    case TCP_INFO: return get_tcp_info(s, value, length);
    case TCP_CONGESTION:
      return give(*s->congestion ? s->congestion : no_congestion, sizeof no_congestion, value, length);
    default: return -ENOPROTOOPT;
  }
}

int socket_getsockopt(struct vsocket *s, int level, int name, void *value, socklen_t *length) {
  if (!connection_usable(s)) return -EBADF;
  if ((int32_t)*length < 0) return -EINVAL;
  int index = kept_index(s, level, name);
  if (index >= 0)
    return give_int((int)((uint32_t)kept_options[index].value + (uint32_t)s->kept[index]), value, length);
  switch (level) {
    case SOL_SOCKET: return get_socket_level(s, name, value, length);
    case IPPROTO_TCP: return get_tcp_level(s, name, value, length);
    case IPPROTO_IP: return -ENOPROTOOPT;
    default:
      if (s->family == AF_INET) return -EOPNOTSUPP; /* Linux's two families differ */
      if (level != IPPROTO_IPV6 || name != IPV6_V6ONLY) return -ENOPROTOOPT;
      return give_int((s->bind_flags & VMMC_BIND_V6ONLY) != 0, value, length);
  }
}

/* ---- ioctl ---- */

static uint64_t bytes_waiting(const struct vsocket *s) {
  return atomic_load_explicit(&nic_slot(s->endpoint, s->slot)->placed, memory_order_acquire) -
         atomic_load_explicit(&app_slot(s->endpoint, s->slot)->consumed, memory_order_relaxed);
}

int socket_ioctl(struct vsocket *s, unsigned long request, int *number) {
  if (!connection_usable(s)) return -EBADF;
  bool connected = connection_view(s).connected;
  switch (request) {
    case FIONREAD: /* SIOCINQ */
      if (s->phase == SOCKET_LISTENING) return -EINVAL;
      if (connected) endpoint_let_nic_catch_up();
      *number = connected ? (int)bytes_waiting(s) : 0;
      return 0;
    case TIOCOUTQ: /* SIOCOUTQ */
    case SIOCOUTQNSD:
      if (s->phase == SOCKET_LISTENING) return -EINVAL;
      *number = !connected ? 0 : request == TIOCOUTQ ? (int)connection_unacknowledged(s) : (int)connection_unsent(s);
      return 0;
    case SIOCATMARK: *number = 0; return 0;
    default: return -ENOTTY;
  }
}
