/* A clock that stands still while the process is stopped, and an end for what hangs. Both live in a thread that needs no lock of
   Python's, so they go on where code in C holds it. The clock adds up short naps; one that took long was a stop. */
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <time.h>
#include <unistd.h>

#define NAP 50000000 /* nanoseconds */
#define LONGEST 0.25 /* seconds that a nap counts for at most */
#define PATIENCE 100 /* naps for which the end waits for the stacks to be written */

static _Atomic double ran, last, end = -1.0;
static int dump_signal, output;
static atomic_int dumped;

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

static void nap(void) {
    struct timespec t = {0, NAP};
    nanosleep(&t, NULL);
}

static double since_last(void) {
    double passed = now() - last;
    return passed < LONGEST ? passed : LONGEST;
}

/* Python's handler for the signal writes the stacks, which may block where nobody reads them. */
static void *dump(void *unused) {
    sigset_t set;
    char text[64];
    int size = snprintf(text, sizeof text, "Timeout after %.1f s!\n", ran);
    if (output >= 0 && write(output, text, size) == size) {
        sigemptyset(&set);
        sigaddset(&set, dump_signal);
        pthread_sigmask(SIG_UNBLOCK, &set, NULL);
        raise(dump_signal);
    }
    dumped = 1;
    return unused;
}

static void *tick(void *unused) {
    pthread_t writer;
    for (;;) {
        nap();
        double passed = since_last();
        last = now();
        ran = ran + passed; /* this thread alone writes it */
        if (end >= 0 && ran >= end) {
            if (pthread_create(&writer, NULL, dump, NULL) == 0)
                for (int naps = 0; !dumped && naps < PATIENCE; naps++) nap();
            _exit(1);
        }
    }
    return unused;
}

/* Begin. Returns 0, or what went wrong. output: the descriptor that the stacks go to, or -1. */
int begin(int signal_of_dump, int descriptor) {
    sigset_t all, before;
    pthread_t thread;
    dump_signal = signal_of_dump, output = descriptor, last = now();
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* no signal of Python's strikes here */
    int wrong = pthread_create(&thread, NULL, tick, NULL);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return wrong;
}

/* Seconds that the process has run since `begin`. */
double running(void) { return ran + since_last(); }

/* End the process once the clock shows this; a negative number for never. */
void end_at(double seconds) { end = seconds; }
