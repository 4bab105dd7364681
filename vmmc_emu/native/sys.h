/*
 * sys.h: kernel calls that go to the kernel, whoever interposes libc.
 *
 * The preload library replaces libc's socket, close, fcntl … and `syscall` itself for the whole
 * process, this library included.  Inside it, what touches descriptors of its own must not come back
 * to it through those, so it makes the call by instruction.  All return a value >= 0 or -errno, and
 * leave errno alone.
 */
#ifndef VMMC_SYS_H
#define VMMC_SYS_H

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static inline long sys_call(long number, long a, long b, long c, long d, long e, long f) {
#if defined(__x86_64__)
  register long r10 __asm__("r10") = d;
  register long r8 __asm__("r8") = e;
  register long r9 __asm__("r9") = f;
  long result;
  __asm__ volatile("syscall"
                   : "=a"(result)
                   : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
                   : "rcx", "r11", "memory");
  return result;
#elif defined(__aarch64__)
  register long x8 __asm__("x8") = number;
  register long x0 __asm__("x0") = a;
  register long x1 __asm__("x1") = b;
  register long x2 __asm__("x2") = c;
  register long x3 __asm__("x3") = d;
  register long x4 __asm__("x4") = e;
  register long x5 __asm__("x5") = f;
  __asm__ volatile("svc 0"
                   : "+r"(x0)
                   : "r"(x8), "r"(x1), "r"(x2), "r"(x3), "r"(x4), "r"(x5)
                   : "memory");
  return x0;
#else
#error "vmmc-emu makes kernel calls by instruction: add this architecture's here"
#endif
}

static inline int sys_socket(int family, int type, int protocol) {
  return (int)sys_call(SYS_socket, family, type, protocol, 0, 0, 0);
}
static inline int sys_connect(int fd, const struct sockaddr *address, socklen_t length) {
  return (int)sys_call(SYS_connect, fd, (long)address, (long)length, 0, 0, 0);
}
static inline int sys_setsockopt(int fd, int level, int name, const void *value, socklen_t length) {
  return (int)sys_call(SYS_setsockopt, fd, level, name, (long)value, (long)length, 0);
}
static inline ssize_t sys_sendmsg(int fd, const struct msghdr *message, int flags) {
  return sys_call(SYS_sendmsg, fd, (long)message, flags, 0, 0, 0);
}
static inline ssize_t sys_recvmsg(int fd, struct msghdr *message, int flags) {
  return sys_call(SYS_recvmsg, fd, (long)message, flags, 0, 0, 0);
}
static inline int sys_close(int fd) { return (int)sys_call(SYS_close, fd, 0, 0, 0, 0, 0); }
static inline int sys_fcntl(int fd, int command, long argument) {
  return (int)sys_call(SYS_fcntl, fd, command, argument, 0, 0, 0);
}
static inline int sys_getpid(void) { return (int)sys_call(SYS_getpid, 0, 0, 0, 0, 0, 0); }
static inline int sys_nanosleep(const struct timespec *duration) {
  return (int)sys_call(SYS_nanosleep, (long)duration, 0, 0, 0, 0, 0);
}

/* Blocks every signal and keeps the old mask in *old; sys_restore_signals takes it back.  The mask is
 * the kernel's 64-bit one. */
static inline void sys_block_signals(uint64_t *old) {
  uint64_t all = UINT64_MAX;
  sys_call(SYS_rt_sigprocmask, SIG_SETMASK, (long)&all, (long)old, sizeof all, 0, 0);
}
static inline void sys_restore_signals(const uint64_t *old) {
  sys_call(SYS_rt_sigprocmask, SIG_SETMASK, (long)old, 0, sizeof *old, 0, 0);
}

#endif
