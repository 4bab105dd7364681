/* log.c: one line an event, on stderr, which the daemon points at the NIC's log file. */
#include <stdarg.h>
#include <stdio.h>
#include <time.h>

#include "nic.h"

void log_event(const char *level, const char *format, ...) {
  char line[512];
  struct timespec t;
  struct tm tm;
  clock_gettime(CLOCK_REALTIME, &t);
  gmtime_r(&t.tv_sec, &tm);
  int n = snprintf(line, sizeof line, "%04d-%02d-%02dT%02d:%02d:%02d.%03ldZ %s nic node%u: ", tm.tm_year + 1900,
                   tm.tm_mon + 1, tm.tm_mday, tm.tm_hour, tm.tm_min, tm.tm_sec, t.tv_nsec / 1000000, level,
                   nic.node);
  va_list arguments;
  va_start(arguments, format);
  int m = vsnprintf(line + n, sizeof line - (size_t)n - 1, format, arguments);
  va_end(arguments);
  if (m > (int)sizeof line - n - 2) m = (int)sizeof line - n - 2;
  line[n + m] = '\n';
  /* One write: lines of a log that is followed never interleave.  A full disk loses the line. */
  if (write(STDERR_FILENO, line, (size_t)(n + m + 1)) < 0) return;
}
