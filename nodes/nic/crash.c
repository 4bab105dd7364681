/*
 * crash.c: what a NIC leaves in its log when it dies of a signal of its own: where it was, and what it had
 * taken last.  Nothing is kept for that while it runs: commands and packets are still where they lay.
 */
#include <execinfo.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>

#include "nic.h"

enum { FRAMES = 48, NEWEST = 4 };

static void report_endpoint(const struct endpoint *e) {
  crash_line("endpoint %u, serial %u, pid %d: %llu commands taken, %u connections", e->index, e->serial, e->pid,
             (unsigned long long)e->commands_taken, e->own->open);
  for (uint64_t i = e->commands_taken > NEWEST ? e->commands_taken - NEWEST : 0; i < e->commands_taken + 1; i++) {
    const struct own_command *own = &e->own->command[i % VMMC_COMMANDS];
    const struct vmmc_command *c = &own->command;
    if (!e->vmmc_committed || c->index != i || c->op == VMMC_OP_NOP) continue;
    crash_line("  command %llu: op %u, offset %llu, length %llu, remote offset %llu, import %u, export %u, state %u",
               (unsigned long long)c->index, c->op, (unsigned long long)c->offset, (unsigned long long)c->length,
               (unsigned long long)c->remote_offset, c->import_id, c->export_id, own->state);
  }
}

static void on_crash(int signal_number, siginfo_t *information, void *context) {
  (void)context;
  crash_report(signal_number, information->si_addr);
  raise(signal_number); /* SA_RESETHAND: dies of it now */
}

void crash_report(int signal_number, const void *address) {
  void *frame[FRAMES];
  crash_line("%s at address %p; backtrace:", strsignal(signal_number), address);
  int count = backtrace(frame, FRAMES);
  backtrace_symbols_fd(frame, count, STDERR_FILENO);
  crash_line("what it took last:");
  for (uint32_t i = 0; i < nic.live_count; i++) report_endpoint(nic.endpoint[nic.live[i]]);
  links_report();
}

void crash_start(void) {
  static const int deadly[] = { SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGABRT, SIGSYS };
  void *frame[1];
  backtrace(frame, 1); /* loads what it needs now, not when memory is in ruins */
  for (size_t i = 0; i < sizeof deadly / sizeof *deadly; i++) {
    struct sigaction known;
    /* Whoever has a handler already (a sanitizer, dma.c) knows better. */
    if (sigaction(deadly[i], NULL, &known) < 0 || known.sa_handler != SIG_DFL) continue;
    /* SA_RESETHAND: a second fault, in the report itself, ends it. */
    struct sigaction action = { .sa_sigaction = on_crash, .sa_flags = SA_SIGINFO | SA_RESETHAND | SA_NODEFER };
    sigaction(deadly[i], &action, NULL);
  }
}
