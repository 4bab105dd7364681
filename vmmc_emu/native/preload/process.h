/* process.h: what this process is: on a node or not, forked or not. */
#ifndef PRELOAD_PROCESS_H
#define PRELOAD_PROCESS_H

#include <stdbool.h>
#include <stdint.h>

/* On a node of a cluster?  When not, every call goes to the kernel as it is. */
extern bool process_on_node;
extern bool process_diagnostics; /* VMMC_DIAGNOSTICS=1: explain on stderr what forks and execs do */
extern uint32_t process_node, process_nodes;
extern const volatile char *process_alive; /* 1; wiped to 0 by the kernel in a child with its own memory */

/* Finds out all of that: the constructor calls it, and whatever runs before the constructor. */
void process_begin(void);

/* False in a child of fork, also of one that no handler ran for. One load. */
static inline bool process_is_ours(void) { return *process_alive; }

/* Makes the mark that the kernel wipes: called when there is something to lose, the first socket. */
void process_watch_forks(void);

/* Makes the child forget its parent's sockets; runs by itself in a fork handler. */
void process_forked(void);

/* One line on stderr, "vmmc: program[pid]: ...". Safe in signal handlers and vfork children. */
void process_say(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* signals.c: handlers wait for the end of critical sections (wait.h). */
void signals_begin(void);

#endif
