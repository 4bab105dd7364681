/* calls.c: the families of read and write on sockets, and ioctl. */
#include <errno.h>
#include <limits.h>
#include <linux/sockios.h>
#include <net/if.h>
#include <netinet/in.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>

#include "fault.h"
#include "names.h"
#include "process.h"
#include "readiness.h"
#include "real.h"
#include "setup.h"

#define SOCKET_OR(fd, kernel)                        \
  struct file *f = socket_get(fd);                   \
  if (__builtin_expect(f == NULL, 0)) return kernel; \
  if (__builtin_expect(f == &file_forked, 0)) return descriptor_refuse(fd)

static bool is_nonblocking(const struct file *f) {
  return atomic_load_explicit(&f->nonblocking, memory_order_relaxed);
}

static int flags_of(const struct file *f, int flags) { return is_nonblocking(f) ? flags | MSG_DONTWAIT : flags; }

/* A single piece at an address that is the kernel's: refused however long it is, and whatever the socket's state. */
static bool is_kernels(const struct iovec *vector, int count) { return count == 1 && (intptr_t)vector->iov_base < 0; }

static ssize_t wrong(struct file *f, int error) {
  file_put(f);
  errno = error;
  return -1;
}

static ssize_t receive(struct file *f, const struct iovec *vector, int count, int flags) {
  if (__builtin_expect(is_kernels(vector, count), 0)) return wrong(f, EFAULT);
  if (__builtin_expect(flags & MSG_ERRQUEUE, 0)) return wrong(f, EAGAIN); /* which is empty */
  ssize_t result;
  {
    HOLDING(f);
    pthread_testcancel(); /* where nothing has to be waited for as well */
    result = socket_receive(f->socket, vector, count, flags_of(f, flags));
  }
  if (result >= 0) return result;
  errno = (int)-result;
  return -1;
}

static ssize_t received(struct file *f, const struct iovec *vector, int count, int flags) {
  return receive(f, vector, count, flags & ~SOCKET_ANY_HANDLER);
}

static ssize_t sent(struct file *f, const struct iovec *vector, int count, int flags) {
  if (__builtin_expect(is_kernels(vector, count), 0)) return wrong(f, EFAULT);
  ssize_t result;
  {
    HOLDING(f);
    pthread_testcancel();
    result = socket_send(f->socket, vector, count, flags_of(f, flags));
  }
  if (result >= 0) return result;
  if (result == -EPIPE && !(flags & MSG_NOSIGNAL)) raise(SIGPIPE);
  errno = (int)-result;
  return -1;
}

/* ---- arguments, as the kernel takes them in: copied, and looked at before anything happens; an errno or 0 ---- */

static int take_vector(struct iovec *vector, const struct iovec *given, size_t count) {
  if (!fault_copy(vector, given, count * sizeof *vector)) return EFAULT;
  for (size_t i = 0; i < count; i++) {
    if ((ssize_t)vector[i].iov_len < 0) return EINVAL;
    if (vector[i].iov_len && (intptr_t)vector[i].iov_base < 0) return EFAULT; /* the rest is found when it is copied */
  }
  return 0;
}

static int take_message(struct msghdr *message, const struct msghdr *given) {
  if (!fault_copy(message, given, sizeof *message)) return EFAULT;
  return message->msg_iovlen > IOV_MAX ? EMSGSIZE : 0;
}

/* The address of a message to a connected socket: of no use, but looked at. */
static int unused_address(const void *address, socklen_t length) {
  struct sockaddr_storage unused;
  if (!address) return 0;
  if (length > sizeof unused) return EINVAL;
  return fault_copy(&unused, address, length) ? 0 : EFAULT;
}

enum { FLAG_OF_THE_KERNEL = INT_MIN }; /* MSG_CMSG_COMPAT: with which no program may call */

/* Control messages of a program's, none of which TCP makes anything of: looked at as by the kernel. */
static int take_control(const struct msghdr *message) {
  enum { MOST = 128 * 1024 }; /* net.core.optmem_max */
  size_t length = message->msg_controllen;
  if (!length) return 0;
  if (length > MOST) return ENOBUFS;
  char few[256]; /* enough for most, and without the allocator, which a signal handler may have interrupted */
  char *control = length <= sizeof few ? few : malloc(length);
  if (!control) return ENOBUFS;
  int error = fault_copy(control, message->msg_control, length) ? 0 : EFAULT;
  for (size_t at = 0; !error && length - at >= sizeof(struct cmsghdr);) {
    struct cmsghdr c;
    memcpy(&c, control + at, sizeof c);
    bool known = c.cmsg_level != SOL_SOCKET || c.cmsg_type == SCM_RIGHTS || c.cmsg_type == SCM_CREDENTIALS;
    if (c.cmsg_len < sizeof c || c.cmsg_len > length - at || !known) error = EINVAL;
    else if (CMSG_ALIGN(c.cmsg_len) >= length - at) break;
    else at += CMSG_ALIGN(c.cmsg_len);
  }
  if (control != few) free(control);
  return error;
}

/* Who sent: on TCP nobody is named, and the length says so. */
static int name_nobody(const void *address, socklen_t *length) {
  socklen_t before, none = 0;
  if (!address) return 0;
  if (!fault_copy(&before, length, sizeof before)) return EFAULT;
  if ((int32_t)before < 0) return EINVAL;
  return fault_copy(length, &none, sizeof none) ? 0 : EFAULT;
}

#define REFUSE_IF(error)                         \
  do {                                           \
    int error_ = (error);                        \
    if (error_) return (int)wrong(f, error_);    \
  } while (0)

/* What went wrong after the bytes were moved, as in the kernel. */
static int too_late(int error) {
  errno = error;
  return -1;
}

/* ---- receiving ---- */

INTERPOSE ssize_t read(int fd, void *buffer, size_t length) {
  SOCKET_OR(fd, REAL(read)(fd, buffer, length));
  if (length == 0 && (intptr_t)buffer >= 0) return file_put(f), 0;
  return received(f, &(struct iovec){buffer, length}, 1, 0);
}
ssize_t __read(int fd, void *buffer, size_t length) __attribute__((alias("read"), visibility("default")));

INTERPOSE ssize_t __read_chk(int fd, void *buffer, size_t length, size_t size) {
  if (length > size) __chk_fail();
  return read(fd, buffer, length);
}

/* readv and writev of no bytes do nothing, whatever became of the socket; recvmsg and sendmsg look at it. */
static bool is_empty(const struct iovec *vector, int count) {
  size_t length = 0;
  for (int i = 0; i < count; i++) length |= vector[i].iov_len;
  return length == 0 && !is_kernels(vector, count);
}

INTERPOSE ssize_t readv(int fd, const struct iovec *vector, int count) {
  SOCKET_OR(fd, REAL(readv)(fd, vector, count));
  REFUSE_IF(count < 0 || count > IOV_MAX ? EINVAL : 0);
  struct iovec pieces[count + 1];
  REFUSE_IF(take_vector(pieces, vector, (size_t)count));
  if (is_empty(pieces, count)) return file_put(f), 0;
  return received(f, pieces, count, 0);
}

/* With the position -1 these two are readv and writev; a socket has no other position, as the kernel says itself. */
enum { ORDINARY = RWF_HIPRI | RWF_DSYNC | RWF_SYNC | RWF_APPEND, KNOWN = ORDINARY | RWF_NOWAIT };

INTERPOSE ssize_t preadv64v2(int fd, const struct iovec *vector, int count, off64_t position, int flags) {
  if (position != -1 || flags & ~KNOWN) return REAL(preadv64v2)(fd, vector, count, position, flags);
  SOCKET_OR(fd, REAL(preadv64v2)(fd, vector, count, position, flags));
  REFUSE_IF(count < 0 || count > IOV_MAX ? EINVAL : 0);
  struct iovec pieces[count + 1];
  REFUSE_IF(take_vector(pieces, vector, (size_t)count));
  if (is_empty(pieces, count)) return file_put(f), 0;
  return received(f, pieces, count, flags & RWF_NOWAIT ? MSG_DONTWAIT : 0);
}
INTERPOSE ssize_t preadv2(int fd, const struct iovec *vector, int count, off_t position, int flags) {
  return preadv64v2(fd, vector, count, position, flags);
}

INTERPOSE ssize_t recv(int fd, void *buffer, size_t length, int flags) {
  SOCKET_OR(fd, REAL(recv)(fd, buffer, length, flags));
  return received(f, &(struct iovec){buffer, length}, 1, flags);
}
INTERPOSE ssize_t __recv_chk(int fd, void *buffer, size_t length, size_t size, int flags) {
  if (length > size) __chk_fail();
  return recv(fd, buffer, length, flags);
}

INTERPOSE ssize_t recvfrom(int fd, void *restrict buffer, size_t length, int flags, struct sockaddr *restrict address,
                           socklen_t *restrict address_length) {
  SOCKET_OR(fd, REAL(recvfrom)(fd, buffer, length, flags, address, address_length));
  ssize_t result = received(f, &(struct iovec){buffer, length}, 1, flags);
  int error = result < 0 ? 0 : name_nobody(address, address_length);
  return error ? too_late(error) : result;
}
INTERPOSE ssize_t __recvfrom_chk(int fd, void *buffer, size_t length, size_t size, int flags, struct sockaddr *address,
                                 socklen_t *address_length) {
  if (length > size) __chk_fail();
  return recvfrom(fd, buffer, length, flags, address, address_length);
}

/* Descriptors that came over an AF_UNIX socket have numbers that the kernel gives out anew. */
static void arrived(const struct msghdr *message) {
  for (struct cmsghdr *c = CMSG_FIRSTHDR(message); c; c = CMSG_NXTHDR((struct msghdr *)(uintptr_t)message, c)) {
    if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS) continue;
    for (size_t i = 0; i < (c->cmsg_len - CMSG_LEN(0)) / sizeof(int); i++) {
      int fd;
      memcpy(&fd, CMSG_DATA(c) + i * sizeof fd, sizeof fd);
      descriptor_fresh(fd);
    }
  }
}

static ssize_t kernel_recvmsg(int fd, struct msghdr *message, int flags) {
  ssize_t result = REAL(recvmsg)(fd, message, flags);
  if (result >= 0 && process_on_node && message->msg_controllen) arrived(message);
  return result;
}

static ssize_t receive_message(int fd, struct msghdr *message, int flags, int how) {
  SOCKET_OR(fd, kernel_recvmsg(fd, message, flags));
  struct msghdr m;
  REFUSE_IF(flags & FLAG_OF_THE_KERNEL ? EINVAL : 0);
  REFUSE_IF(take_message(&m, message));
  struct iovec pieces[m.msg_iovlen + 1];
  REFUSE_IF(take_vector(pieces, m.msg_iov, m.msg_iovlen));
  ssize_t result = receive(f, pieces, (int)m.msg_iovlen, (flags & ~SOCKET_ANY_HANDLER) | how);
  if (result < 0) return result;
  m.msg_controllen = 0;
  m.msg_flags = flags & MSG_CMSG_CLOEXEC; /* of which Linux tells, though it gave nothing */
  int error = name_nobody(m.msg_name, &message->msg_namelen);
  if (!error && !(fault_copy(&message->msg_flags, &m.msg_flags, sizeof m.msg_flags) &&
                  fault_copy(&message->msg_controllen, &m.msg_controllen, sizeof m.msg_controllen)))
    error = EFAULT;
  return error ? too_late(error) : result;
}

INTERPOSE ssize_t recvmsg(int fd, struct msghdr *message, int flags) { return receive_message(fd, message, flags, 0); }

INTERPOSE int recvmmsg(int fd, struct mmsghdr *messages, unsigned count, int flags, struct timespec *timeout) {
  SOCKET_OR(fd, REAL(recvmmsg)(fd, messages, count, flags, timeout));
  struct timespec limit = {0, 0};
  REFUSE_IF(timeout && !fault_copy(&limit, timeout, sizeof limit) ? EFAULT : 0);
  REFUSE_IF(limit.tv_sec < 0 || limit.tv_nsec < 0 || limit.tv_nsec >= 1000000000 ? EINVAL : 0);
  file_put(f);
  uint64_t start = vmmc_now_ns();
  unsigned done = 0;
  while (done < count) {
    int wait = flags & MSG_WAITFORONE && done ? flags | MSG_DONTWAIT : flags;
    /* Who has some returns with it when any handler runs. */
    ssize_t got = receive_message(fd, &messages[done].msg_hdr, wait & ~MSG_WAITFORONE, done ? SOCKET_ANY_HANDLER : 0);
    if (got < 0) break;
    unsigned length = (unsigned)got;
    if (!fault_copy(&messages[done].msg_len, &length, sizeof length)) {
      errno = EFAULT;
      break;
    }
    done++;
    /* As the kernel does: the time is looked at after each message only. */
    if (timeout && vmmc_now_ns() - start >= (uint64_t)limit.tv_sec * 1000000000 + (uint64_t)limit.tv_nsec) break;
  }
  return done || !count ? (int)done : -1;
}

/* ---- sending ---- */

INTERPOSE ssize_t write(int fd, const void *buffer, size_t length) {
  SOCKET_OR(fd, REAL(write)(fd, buffer, length));
  return sent(f, &(struct iovec){(void *)(uintptr_t)buffer, length}, 1, 0);
}
ssize_t __write(int fd, const void *buffer, size_t length) __attribute__((alias("write"), visibility("default")));

INTERPOSE ssize_t writev(int fd, const struct iovec *vector, int count) {
  SOCKET_OR(fd, REAL(writev)(fd, vector, count));
  REFUSE_IF(count < 0 || count > IOV_MAX ? EINVAL : 0);
  struct iovec pieces[count + 1];
  REFUSE_IF(take_vector(pieces, vector, (size_t)count));
  if (is_empty(pieces, count)) return file_put(f), 0;
  return sent(f, pieces, count, 0);
}

INTERPOSE ssize_t pwritev64v2(int fd, const struct iovec *vector, int count, off64_t position, int flags) {
  if (position != -1 || flags & ~KNOWN) return REAL(pwritev64v2)(fd, vector, count, position, flags);
  SOCKET_OR(fd, REAL(pwritev64v2)(fd, vector, count, position, flags));
  REFUSE_IF(count < 0 || count > IOV_MAX ? EINVAL : 0);
  struct iovec pieces[count + 1];
  REFUSE_IF(take_vector(pieces, vector, (size_t)count));
  if (is_empty(pieces, count)) return file_put(f), 0;
  return sent(f, pieces, count, flags & RWF_NOWAIT ? MSG_DONTWAIT : 0);
}
INTERPOSE ssize_t pwritev2(int fd, const struct iovec *vector, int count, off_t position, int flags) {
  return pwritev64v2(fd, vector, count, position, flags);
}

/* MSG_FASTOPEN: connects first.  VMMC's connect is as fast as one that carries bytes would be. */
static int open_fast(int fd, struct file *f, const struct sockaddr *address, socklen_t length) {
  if (address) return connect(fd, address, length);
  uint32_t phase = atomic_load(&f->socket->phase);
  errno = phase == SOCKET_NEW || phase == SOCKET_BOUND ? EINVAL : EISCONN;
  return -1;
}
#define CONNECT_IF_ASKED(address, length)                                                       \
  do {                                                                                          \
    if (__builtin_expect(flags & MSG_FASTOPEN, 0)) {                                            \
      if (open_fast(fd, f, address, length) < 0) return (int)wrong(f, errno);                   \
      flags &= ~MSG_FASTOPEN;                                                                   \
    }                                                                                           \
  } while (0)

INTERPOSE ssize_t send(int fd, const void *buffer, size_t length, int flags) {
  SOCKET_OR(fd, REAL(send)(fd, buffer, length, flags));
  CONNECT_IF_ASKED(NULL, 0);
  return sent(f, &(struct iovec){(void *)(uintptr_t)buffer, length}, 1, flags);
}
ssize_t __send(int fd, const void *buffer, size_t length, int flags)
    __attribute__((alias("send"), visibility("default")));

INTERPOSE ssize_t sendto(int fd, const void *buffer, size_t length, int flags, const struct sockaddr *address,
                         socklen_t address_length) {
  SOCKET_OR(fd, address && setup_refuses(fd, address, address_length)
                    ? -1
                    : REAL(sendto)(fd, buffer, length, flags, address, address_length));
  REFUSE_IF(unused_address(address, address_length));
  CONNECT_IF_ASKED(address, address_length);
  return sent(f, &(struct iovec){(void *)(uintptr_t)buffer, length}, 1, flags);
}

/* A VMMC socket is memory of this process: it cannot be handed to another over AF_UNIX. */
struct cargo {
  struct msghdr message;
  bool has_ours;
};
static void look_for_ours(void *context) {
  struct cargo *cargo = context;
  for (struct cmsghdr *c = CMSG_FIRSTHDR(&cargo->message); c; c = CMSG_NXTHDR(&cargo->message, c)) {
    if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS) continue;
    for (size_t i = 0; i < (c->cmsg_len - CMSG_LEN(0)) / sizeof(int); i++) {
      int fd;
      memcpy(&fd, CMSG_DATA(c) + i * sizeof fd, sizeof fd);
      struct file *f = descriptor_peek(fd);
      if (f && f->kind != FILE_EPOLL) cargo->has_ours = true;
    }
  }
}

/* What cannot be read is the kernel's to answer. */
static bool refuses_message(int fd, const struct msghdr *given) {
  struct cargo cargo = {.has_ours = false};
  if (!process_on_node || !fault_copy(&cargo.message, given, sizeof cargo.message)) return false;
  const struct msghdr *message = &cargo.message;
  if (message->msg_control && message->msg_controllen && fault_guard(look_for_ours, &cargo) && cargo.has_ours) {
    static _Atomic bool said;
    if (!atomic_exchange(&said, true))
      process_say("a VMMC socket cannot be passed to another process over an AF_UNIX socket (EOPNOTSUPP)");
    errno = EOPNOTSUPP;
    return true;
  }
  return message->msg_name && setup_refuses(fd, message->msg_name, message->msg_namelen);
}

INTERPOSE ssize_t sendmsg(int fd, const struct msghdr *message, int flags) {
  SOCKET_OR(fd, refuses_message(fd, message) ? -1 : REAL(sendmsg)(fd, message, flags));
  struct msghdr m;
  REFUSE_IF(flags & FLAG_OF_THE_KERNEL ? EINVAL : 0);
  REFUSE_IF(take_message(&m, message));
  if (m.msg_namelen > sizeof(struct sockaddr_storage) && (int)m.msg_namelen > 0) m.msg_namelen = sizeof(struct sockaddr_storage);
  REFUSE_IF(unused_address(m.msg_name, m.msg_namelen));
  struct iovec pieces[m.msg_iovlen + 1];
  REFUSE_IF(take_vector(pieces, m.msg_iov, m.msg_iovlen));
  REFUSE_IF(take_control(&m));
  CONNECT_IF_ASKED(m.msg_name, m.msg_namelen);
  return sent(f, pieces, (int)m.msg_iovlen, flags);
}

INTERPOSE int sendmmsg(int fd, struct mmsghdr *messages, unsigned count, int flags) {
  if (!descriptor_peek(fd)) {
    for (unsigned i = 0; messages && process_on_node && i < count; i++) {
      if (!refuses_message(fd, &messages[i].msg_hdr)) continue;
      return i ? REAL(sendmmsg)(fd, messages, i, flags) : -1; /* those before it are sent */
    }
    return REAL(sendmmsg)(fd, messages, count, flags);
  }
  unsigned done = 0;
  while (done < count) {
    ssize_t put = sendmsg(fd, &messages[done].msg_hdr, flags);
    if (put < 0) break;
    unsigned length = (unsigned)put;
    if (!fault_copy(&messages[done].msg_len, &length, sizeof length)) {
      errno = EFAULT;
      break;
    }
    done++;
  }
  return done || !count ? (int)done : -1;
}

/* ---- files ---- */

static void free_buffer(void *buffer) { free(buffer); }

/* f stays the caller's. */
static ssize_t send_file_held(struct file *f, int from, off64_t *offset, size_t length) {
  struct stat status;
  int flags = REAL(fcntl)(from, F_GETFL);
  if (flags < 0 || (flags & O_ACCMODE) == O_WRONLY) return -EBADF;
  if (fstat(from, &status) < 0) return -errno;
  if (offset && (S_ISFIFO(status.st_mode) || S_ISSOCK(status.st_mode))) return -ESPIPE;
  if ((ssize_t)length < 0) return -EINVAL;
  if (!S_ISREG(status.st_mode) && !S_ISBLK(status.st_mode) && !S_ISCHR(status.st_mode)) return -EINVAL;
  off64_t at = offset ? *offset : lseek64(from, 0, SEEK_CUR);
  if (at < 0) return -EINVAL;
  enum { CHUNK = 64 * 1024 };
  char *buffer = malloc(CHUNK);
  if (!buffer) return -ENOMEM;
  AT_END(freed, free_buffer, buffer);
  ssize_t total = 0, result = 0;
  while ((size_t)total < length) {
    /* Room first: what is read and does not fit would be read again. */
    if (is_nonblocking(f) && f->socket->phase != SOCKET_LISTENING &&
        !(socket_ready(f->socket) & (EPOLLOUT | EPOLLERR | EPOLLHUP))) {
      result = -EAGAIN;
      break;
    }
    size_t chunk = length - (size_t)total < CHUNK ? length - (size_t)total : CHUNK;
    ssize_t got = pread64(from, buffer, chunk, at);
    if (got < 0) result = -errno;
    if (got <= 0) break;
    result = socket_send(f->socket, &(struct iovec){buffer, (size_t)got}, 1, flags_of(f, 0));
    if (result < 0) break;
    total += result;
    at += result;
    if (result < got) break; /* non-blocking and full, or interrupted */
  }
  if (offset) *offset = at;
  else if (total) lseek64(from, at, SEEK_SET);
  return total ? total : result;
}

static ssize_t send_file(struct file *f, int from, off64_t *offset, size_t length) {
  ssize_t result;
  {
    HOLDING(f);
    result = send_file_held(f, from, offset, length);
  }
  if (result >= 0) return result;
  if (result == -EPIPE) raise(SIGPIPE);
  errno = (int)-result;
  return -1;
}

INTERPOSE ssize_t sendfile64(int to, int from, off64_t *offset, size_t length) {
  SOCKET_OR(to, descriptor_peek(from) ? (errno = EINVAL, -1) : REAL(sendfile64)(to, from, offset, length));
  off64_t at = 0;
  REFUSE_IF(offset && !fault_copy(&at, offset, sizeof at) ? EFAULT : 0);
  ssize_t result = send_file(f, from, offset ? &at : NULL, length);
  return offset && !fault_copy(offset, &at, sizeof at) ? too_late(EFAULT) : result;
}
INTERPOSE ssize_t sendfile(int to, int from, off_t *offset, size_t length) {
  SOCKET_OR(to, descriptor_peek(from) ? (errno = EINVAL, -1) : REAL(sendfile)(to, from, offset, length));
  off_t at = 0;
  REFUSE_IF(offset && !fault_copy(&at, offset, sizeof at) ? EFAULT : 0);
  off64_t wide = at;
  ssize_t result = send_file(f, from, offset ? &wide : NULL, length);
  at = (off_t)wide;
  return offset && !fault_copy(offset, &at, sizeof at) ? too_late(EFAULT) : result;
}

/* Between a socket and a pipe: in pieces for which the receiving side has room before the other gives them, so that
 * what cannot be moved stays where it is.  SPLICE_F_NONBLOCK is of the pipe, O_NONBLOCK of the socket, and whoever
 * has moved something waits for neither.  1: the pipe is ready; 0 or -errno: it is not. */
static int pipe_is_ready(int pipe, short events, bool waits) {
  int ready = REAL(poll)(&(struct pollfd){.fd = pipe, .events = events}, 1, waits ? -1 : 0);
  return ready < 0 ? -errno : ready;
}

static ssize_t splice_to_pipe(struct file *f, int pipe, size_t length, unsigned flags) {
  char piece[PIPE_BUF]; /* for which a pipe has room when it says that it has any */
  ssize_t total = 0, got = 0;
  while ((size_t)total < length) {
    int room = pipe_is_ready(pipe, POLLOUT, !total && !(flags & SPLICE_F_NONBLOCK));
    if (room <= 0) return total ? total : room ? room : -EAGAIN;
    struct iovec into = {piece, length - (size_t)total < sizeof piece ? length - (size_t)total : sizeof piece};
    got = socket_receive(f->socket, &into, 1, flags_of(f, total ? MSG_DONTWAIT : 0));
    if (got <= 0) break;
    if (REAL(write)(pipe, piece, (size_t)got) < 0) return total ? total : -errno;
    total += got;
  }
  return total ? total : got;
}

static ssize_t splice_from_pipe(struct file *f, int pipe, size_t length, unsigned flags) {
  char piece[16384];
  size_t most = f->socket->send_buffer ? f->socket->send_buffer / 3 : sizeof piece; /* fits into a writable socket */
  if (most > sizeof piece) most = sizeof piece;
  ssize_t total = 0;
  while ((size_t)total < length) {
    int there = pipe_is_ready(pipe, POLLIN, !total && !(flags & SPLICE_F_NONBLOCK));
    if (there <= 0) return total ? total : there ? there : -EAGAIN;
    /* A socket that takes nothing says so before the pipe has given anything. */
    ssize_t result = socket_send(f->socket, &(struct iovec){piece, 0}, 1, flags_of(f, 0));
    if (result == 0 && is_nonblocking(f) && !(socket_ready(f->socket) & EPOLLOUT)) result = -EAGAIN;
    if (result < 0) return total ? total : result;
    ssize_t got = REAL(read)(pipe, piece, length - (size_t)total < most ? length - (size_t)total : most);
    if (got <= 0) return total ? total : got < 0 ? -errno : 0;
    for (ssize_t done = 0; done < got; done += result) {
      result = socket_send(f->socket, &(struct iovec){piece + done, (size_t)(got - done)}, 1, 0);
      if (result < 0) return total ? total : result;
      total += result;
    }
  }
  return total;
}

INTERPOSE ssize_t splice(int from, off64_t *from_offset, int to, off64_t *to_offset, size_t length, unsigned flags) {
  struct file *source = socket_get(from), *f = source ? source : socket_get(to);
  if (!f) return REAL(splice)(from, from_offset, to, to_offset, length, flags);
  if (f == &file_forked) return descriptor_refuse(source ? from : to);
  if (!length) return file_put(f), 0;
  enum { ALL = SPLICE_F_MOVE | SPLICE_F_NONBLOCK | SPLICE_F_MORE | SPLICE_F_GIFT };
  REFUSE_IF(flags & ~(unsigned)ALL ? EINVAL : 0);
  int pipe = source ? to : from, mode = REAL(fcntl)(pipe, F_GETFL) & O_ACCMODE;
  REFUSE_IF(REAL(fcntl)(pipe, F_GETFD) < 0 || mode == (source ? O_RDONLY : O_WRONLY) ? EBADF : 0);
  bool is_pipe = REAL(fcntl)(pipe, F_GETPIPE_SZ) >= 0;
  REFUSE_IF(is_pipe && (source ? to_offset : from_offset) ? ESPIPE : 0);
  off64_t unused;
  REFUSE_IF(from_offset && !fault_copy(&unused, from_offset, sizeof unused) ? EFAULT : 0);
  REFUSE_IF(to_offset && !fault_copy(&unused, to_offset, sizeof unused) ? EFAULT : 0);
  /* One of the two must be a pipe, and the other, a socket, has no position. */
  REFUSE_IF(!is_pipe || from_offset || to_offset || (ssize_t)length < 0 ? EINVAL : 0);
  ssize_t result;
  {
    HOLDING(f);
    result = source ? splice_to_pipe(f, pipe, length, flags) : splice_from_pipe(f, pipe, length, flags);
  }
  if (result >= 0) return result;
  if (result == -EPIPE && !source) raise(SIGPIPE); /* of a pipe without readers the kernel has */
  errno = (int)-result;
  return -1;
}

/* ---- ioctl ---- */

/* A socket of the kernel's, too, is asked for interfaces: what is no socket gets the kernel's answer. */
static int kernel_ioctl(int fd, unsigned long request, void *argument) {
  int type, result = -ENOTTY;
  socklen_t length = sizeof type;
  if (process_on_node && request >= 0x8900 && request < 0x8a00 &&
      REAL(getsockopt)(fd, SOL_SOCKET, SO_TYPE, &type, &length) == 0)
    result = names_ioctl(request, argument);
  if (result == -ENOTTY) return REAL(ioctl)(fd, request, argument);
  if (result == 0) return 0;
  errno = -result;
  return -1;
}

INTERPOSE int ioctl(int fd, unsigned long request, ...) {
  va_list arguments;
  va_start(arguments, request);
  void *argument = va_arg(arguments, void *);
  va_end(arguments);
  SOCKET_OR(fd, kernel_ioctl(fd, request, argument));
  int result, number;
  if (request == FIONBIO) {
    REFUSE_IF(fault_copy(&number, argument, sizeof number) ? 0 : EFAULT);
    atomic_store_explicit(&f->nonblocking, number != 0, memory_order_relaxed);
    result = 0;
  } else if (request == FIOCLEX || request == FIONCLEX || request == FIOSETOWN || request == SIOCSPGRP ||
             request == FIOGETOWN || request == SIOCGPGRP) { /* as F_SETOWN: the number's, whatever stands there */
    result = REAL(ioctl)(fd, request, argument) < 0 ? -errno : 0;
  } else if ((result = socket_ioctl(f->socket, request, &number)) == 0) {
    if (!fault_copy(argument, &number, sizeof number)) result = -EFAULT;
  } else if (result == -ENOTTY && (result = names_ioctl(request, argument)) == -ENOTTY && request >= 0x8900 &&
             request < 0x8a00) {
    /* What else is asked of or told to interfaces is the host's, for which any internet socket will do. */
    int handle = REAL(socket)(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    result = handle < 0 ? -errno : REAL(ioctl)(handle, request, argument) < 0 ? -errno : 0;
    if (handle >= 0) REAL(close)(handle);
  }
  file_put(f);
  if (result >= 0) return result;
  errno = -result;
  return -1;
}
