/*
 * log.c: one line an event, on stderr, which the daemon points at the NIC's log file.
 *
 * Of one kind of event, which is to say of one format, some lines are written in any ten seconds.  What
 * follows is counted, and the count is written when the time is over (an alarm sees to that in a NIC that
 * sleeps), with the newest line that it stands for: no storm of faults fills the disk, and the log's last
 * word on something is true.
 */
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <time.h>

#include "nic.h"

enum { MOST = 20, WINDOW_S = 10, KINDS = 32, LINE = 512, NEWEST = LINE - 128 /* with its count it is a line */ };

static struct kind {
  const char *format;
  time_t began;
  uint64_t count;      /* in this window */
  const char *level;   /* of the newest line that was not written, */
  char newest[NEWEST]; /* and what it says */
} kinds[KINDS];

static volatile sig_atomic_t due; /* a window has ended in which lines were not written */

static void write_line(const char *level, const char *format, va_list arguments) {
  char line[LINE];
  struct timespec t;
  struct tm tm;
  clock_gettime(CLOCK_REALTIME, &t);
  gmtime_r(&t.tv_sec, &tm);
  int n = snprintf(line, sizeof line, "%04d-%02d-%02dT%02d:%02d:%02d.%03ldZ %s nic node%u: ", tm.tm_year + 1900,
                   tm.tm_mon + 1, tm.tm_mday, tm.tm_hour, tm.tm_min, tm.tm_sec, t.tv_nsec / 1000000, level,
                   nic.node);
  int m = vsnprintf(line + n, sizeof line - (size_t)n - 1, format, arguments);
  if (m > (int)sizeof line - n - 2) m = (int)sizeof line - n - 2;
  line[n + m] = '\n';
  /* One write: lines of a log that is followed never interleave.  A full disk loses the line. */
  if (write(STDERR_FILENO, line, (size_t)(n + m + 1)) < 0) return;
}

__attribute__((format(printf, 2, 3))) static void write_event(const char *level, const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  write_line(level, format, arguments);
  va_end(arguments);
}

void crash_line(const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  write_line("error", format, arguments);
  va_end(arguments);
}

static void on_alarm(int signal_number) {
  (void)signal_number;
  due = 1;
  sleep_not();
}

/* Ends a kind's window: says what was not written. */
static void settle(struct kind *kind) {
  if (kind->count > MOST)
    write_event(kind->level, "%llu more lines like this were suppressed, the newest: %.*s",
                (unsigned long long)(kind->count - MOST), NEWEST, kind->newest);
  *kind = (struct kind){ 0 };
}

void log_end(void) {
  for (struct kind *kind = kinds; kind < kinds + KINDS; kind++) settle(kind);
}

static time_t now_s(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC_COARSE, &t);
  return t.tv_sec;
}

/* The kind's place, or that of the one whose window began first. */
static struct kind *kind_of(const char *format, time_t now) {
  struct kind *found = &kinds[0];
  for (struct kind *kind = kinds; kind < kinds + KINDS; kind++) {
    if (kind->format == format) {
      found = kind;
      break;
    }
    if (kind->began < found->began) found = kind;
  }
  if (found->format != format || now - found->began >= WINDOW_S) {
    if (found->format) settle(found);
    *found = (struct kind){ .format = format, .began = now };
  }
  return found;
}

void log_event(const char *level, const char *format, ...) {
  struct kind *kind = kind_of(format, now_s());
  va_list arguments;
  va_start(arguments, format);
  if (++kind->count <= MOST) {
    write_line(level, format, arguments);
  } else {
    kind->level = level;
    vsnprintf(kind->newest, sizeof kind->newest, format, arguments);
    if (kind->count == MOST + 1) {
      struct sigaction action = { .sa_handler = on_alarm };
      sigaction(SIGALRM, &action, NULL);
      alarm(WINDOW_S);
    }
  }
  va_end(arguments);
}

bool log_has_work(void) { return due; }

int log_work(void) {
  if (!due) return 0;
  due = 0;
  time_t now = now_s();
  for (struct kind *kind = kinds; kind < kinds + KINDS; kind++) {
    if (kind->count <= MOST) continue;
    if (now - kind->began >= WINDOW_S)
      settle(kind);
    else
      alarm((unsigned)(WINDOW_S - (now - kind->began)));
  }
  return 1;
}
