/*
 * dma.c: the copy between two programs' memory, and what becomes of memory that is not there.
 *
 * A program can truncate its segment at any time, and a full /dev/shm refuses a page.  The kernel says so
 * with SIGBUS at the load or store.  A copy then ends with EFAULT and harms only the connection or command
 * that it was for.  Anywhere else the firmware looks at a program's requests and positions: that program's
 * segment is then replaced by private zeros, the load goes on and finds nothing asked for, and
 * endpoints_work ends the program's attachment.
 *
 * A program's own memory is written through its /proc/self/mem, which it opened itself: so the rules for
 * ptrace do not matter, and the descriptor stands for that memory for ever.  process_vm_writev would be three
 * times as fast, but it takes a pid, and nothing keeps the number from being another process's by the time
 * of the call, or its memory from being another program's after exec.
 */
#include <setjmp.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "nic.h"
#include "vmmc_copy.h"

static sigjmp_buf fault;
static volatile sig_atomic_t copying;

/* The attached program in whose own segment this address lies.  Only list and addresses are read, which the
 * firmware changes when it looks at no program's memory. */
static struct endpoint *owner_of(const char *address) {
  for (uint32_t i = 0; i < nic.live_count; i++) {
    struct endpoint *e = nic.endpoint[nic.live[i]];
    if (address >= e->app && address < e->app + VMMC_APP_BYTES) return e;
  }
  return NULL;
}

static void on_fault(int signal_number, siginfo_t *info, void *context) {
  (void)context;
  if (copying && info->si_code > 0) siglongjmp(fault, 1); /* from the kernel, and not from somebody's kill() */
  struct endpoint *e = owner_of(info->si_addr);
  int saved = errno;
  if (e && !e->replaced &&
      mmap(e->app, VMMC_APP_BYTES, PROT_READ | PROT_WRITE, MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1,
           0) == (void *)e->app) {
    e->replaced = true;
    if (!e->wrong) e->wrong = "its memory is not there: its segment was truncated, or /dev/shm is full";
    errno = saved;
    return; /* the load is done again, and finds zeros */
  }
  /* Memory of the NIC's own: die of it, as without a handler.  A successor leaves out what is too short. */
  signal(signal_number, SIG_DFL);
  crash_report(signal_number, info->si_addr);
  raise(signal_number);
}

void dma_start(void) {
  /* SA_NODEFER and savesigs 0: leaving by siglongjmp restores no mask, so none may be set. */
  struct sigaction action = { .sa_sigaction = on_fault, .sa_flags = SA_NODEFER | SA_SIGINFO };
  sigaction(SIGBUS, &action, NULL);
}

int dma_copy(void *to, const void *from, size_t length) {
  if (sigsetjmp(fault, 0)) {
    copying = 0;
    return EFAULT;
  }
  copying = 1;
  /* The signal fence keeps the copy inside the window that the handler sees. */
  atomic_signal_fence(memory_order_seq_cst);
  vmmc_copy(to, from, length);
  atomic_signal_fence(memory_order_seq_cst);
  copying = 0;
  return 0;
}

int dma_copy_to_program(int memory, const void *to, const void *from, size_t length) {
  for (size_t done = 0; done < length;) {
    ssize_t n = pwrite(memory, (const char *)from + done, length - done, (off_t)((uintptr_t)to + done));
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return EFAULT; /* 0: that memory is no more */
    done += (size_t)n;
  }
  return 0;
}
