/*
 * crash.c: what a NIC leaves in its log when it dies of a signal of its own: where it was, and what it had
 * taken last.  Nothing is kept for that while it runs: commands and packets are still where they lay.
 */
#include <dlfcn.h>
#include <execinfo.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>

#include "nic.h"

enum { FRAMES = 48, NEWEST = 4 };

static const char *op_name(uint32_t op) {
  static const char *const name[] = {
    [VMMC_OP_NOP] = "NOP",       [VMMC_OP_EXPORT] = "EXPORT",     [VMMC_OP_UNEXPORT] = "UNEXPORT",
    [VMMC_OP_IMPORT] = "IMPORT", [VMMC_OP_UNIMPORT] = "UNIMPORT", [VMMC_OP_SEND] = "SEND",
    [VMMC_OP_FETCH] = "FETCH",
  };
  return op < sizeof name / sizeof *name ? name[op] : "unknown";
}

static const char *state_name(uint32_t state) {
  static const char *const name[] = {
    [COMMAND_NONE] = "done", [COMMAND_WAITS] = "waits to be sent", [COMMAND_ANSWER] = "waits for its answer",
  };
  return state < sizeof name / sizeof *name ? name[state] : "unknown";
}

static void report_endpoint(const struct endpoint *e) {
  crash_line("endpoint %u, serial %u, pid %d: %llu commands taken, %u connections", e->index, e->serial, e->pid,
             (unsigned long long)e->commands_taken, e->own->open);
  for (uint64_t i = e->commands_taken > NEWEST ? e->commands_taken - NEWEST : 0; i < e->commands_taken + 1; i++) {
    const struct own_command *own = &e->own->command[i % VMMC_COMMANDS];
    const struct vmmc_command *c = &own->command;
    if (!e->vmmc_committed || c->index != i || c->op == VMMC_OP_NOP) continue;
    crash_line("  command %llu: op %s, offset %llu, length %llu, remote offset %llu, import %u, export %u, %s",
               (unsigned long long)c->index, op_name(c->op), (unsigned long long)c->offset, (unsigned long long)c->length,
               (unsigned long long)c->remote_offset, c->import_id, c->export_id, state_name(own->state));
  }
}

/* As backtrace_symbols_fd does, whose lines have neither time nor level: it too asks the loader for the names, and
 * allocates nothing. */
static void report_frame(void *address) {
  Dl_info at;
  if (!dladdr(address, &at) || !at.dli_fname)
    crash_line("  [%p]", address);
  else if (!at.dli_sname) /* a static function's: for addr2line */
    crash_line("  %s(+0x%lx) [%p]", at.dli_fname, (unsigned long)((uintptr_t)address - (uintptr_t)at.dli_fbase),
               address);
  else
    crash_line("  %s(%s+0x%lx) [%p]", at.dli_fname, at.dli_sname,
               (unsigned long)((uintptr_t)address - (uintptr_t)at.dli_saddr), address);
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
  for (int i = 0; i < count; i++) report_frame(frame[i]);
  crash_line("what it took last:");
  for (uint32_t i = 0; i < nic.live_count; i++) report_endpoint(nic.endpoint[nic.live[i]]);
  links_report();
  log_end();
}

void crash_start(void) {
  static const int deadly[] = { SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGABRT, SIGSYS };
  void *frame[1];
  Dl_info at;
  /* Loads what they need now, not when memory is in ruins. */
  if (backtrace(frame, 1) > 0) dladdr(frame[0], &at);
  for (size_t i = 0; i < sizeof deadly / sizeof *deadly; i++) {
    struct sigaction known;
    /* Whoever has a handler already (a sanitizer, dma.c) knows better. */
    if (sigaction(deadly[i], NULL, &known) < 0 || known.sa_handler != SIG_DFL) continue;
    /* SA_RESETHAND: a second fault, in the report itself, ends it. */
    struct sigaction action = { .sa_sigaction = on_crash, .sa_flags = SA_SIGINFO | SA_RESETHAND | SA_NODEFER };
    sigaction(deadly[i], &action, NULL);
  }
}
