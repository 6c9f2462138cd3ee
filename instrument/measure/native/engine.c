/* The loops over elements: what NumPy does in a dozen passes, in two that stay in the first-level cache.
 *
 * Optional: where there was no compiler when the package was installed, `instrument.measure.cpu` does the same in NumPy,
 * and the tests hold both to the same codes and counts. Nothing here allocates, keeps state or knows of Python, so that
 * it runs without the interpreter lock.
 *
 * What shaped it, on one core of a server (nanoseconds an element):
 * - counts of codes in one table take 1.1, since each increment waits for the last one of the same code; in four tables
 *   that take turns, 0.35;
 * - sums of float64 in lanes of 16 take 0.2 with their extremes; the compiler makes no vectors of a plain sum, whose
 *   order it may not change;
 * - of many 16-bit values the patterns are counted, which say everything: 0.5;
 * - values are looked at for NaN, Inf and what is too small for code 1 a run at a time, and only such runs go the slow
 *   way, value by value.
 */

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

/* One object runs on every processor of its kind: the loader picks the widest vectors that there are. */
#if defined(__x86_64__) && defined(__linux__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define WIDE __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define WIDE
#endif

/* What is called by them has to be a part of each of them, for the sake of its vectors. */
#if defined(__GNUC__)
#define PART static inline __attribute__((always_inline))
#define PREFETCH(place) __builtin_prefetch(place)
#else
#define PART static inline
#define PREFETCH(place) ((void)0)
#endif

/* Sums and edges are to be rounded as NumPy rounds them: each operation by itself. */
#pragma STDC FP_CONTRACT OFF

enum { FLOAT32, BFLOAT16 };

#define CODES 4096
#define SIGN 2048
#define PATTERNS 65536
#define CODE_SHIFT 20
#define INF_BITS 0x7F800000u
#define NAN_BITS 0x7FC00000u
#define INF_CODE 0x7F8
#define NAN_CODE 0x7FC
#define TABLES 4
#define LANES 16
#define RUN 2048 /* elements of a run: 8 kB of float32 */
#define FIELDS 9
#define GLANCE 64 /* counts that are looked at together, since most are zero; a bit of 64 for each of `CODES` */
#define FEW 256

typedef struct {
    double count, total, squares, low, high; /* as they lie in a row of a device */
} Moments;

PART uint32_t bits_of(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

/* A run as float32: where it lies, or in `room`. */
PART const float *run_of(const void *data, int kind, int64_t start, int64_t size, float *room)
{
    const uint16_t *narrow = (const uint16_t *)data + start;
    uint32_t bits;
    int64_t i;

    if (kind == FLOAT32)
        return (const float *)data + start;
    for (i = 0; i < size; i++) {
        bits = (uint32_t)narrow[i] << 16;
        memcpy(&room[i], &bits, sizeof bits);
    }
    return room;
}

/* Moments of a run whose values are all finite and zero or large enough for a code of their own; returns 0 otherwise. */
PART int add_plain(const float *x, int64_t size, Moments *moments)
{
    double total[LANES] = {0}, squares[LANES] = {0}, all = 0, all_squares = 0;
    float low[LANES], high[LANES], least, most;
    uint32_t rare[LANES] = {0}, any = 0;
    int64_t i, whole = size - size % LANES;
    int k;

    for (k = 0; k < LANES; k++)
        low[k] = INFINITY, high[k] = -INFINITY;
    for (i = 0; i < whole; i += LANES)
        for (k = 0; k < LANES; k++) {
            float value = x[i + k];
            double exact = value;
            uint32_t magnitude;
            memcpy(&magnitude, &x[i + k], sizeof magnitude);
            magnitude &= 0x7FFFFFFFu;
            low[k] = value < low[k] ? value : low[k];
            high[k] = value > high[k] ? value : high[k];
            total[k] += exact;
            squares[k] += exact * exact;
            /* Above the largest finite number, or of code 0 and not zero. */
            rare[k] |= (uint32_t)(magnitude >= INF_BITS) | (uint32_t)(magnitude - 1 < (1u << CODE_SHIFT) - 1);
        }
    for (i = whole; i < size; i++) {
        float value = x[i];
        double exact = value;
        uint32_t magnitude = bits_of(value) & 0x7FFFFFFFu;
        k = (int)(i - whole);
        low[k] = value < low[k] ? value : low[k];
        high[k] = value > high[k] ? value : high[k];
        total[k] += exact;
        squares[k] += exact * exact;
        rare[k] |= (uint32_t)(magnitude >= INF_BITS) | (uint32_t)(magnitude - 1 < (1u << CODE_SHIFT) - 1);
    }
    for (k = 0; k < LANES; k++)
        any |= rare[k];
    if (any)
        return 0;
    least = low[0], most = high[0];
    for (k = 0; k < LANES; k++) {
        all += total[k];
        all_squares += squares[k];
        least = low[k] < least ? low[k] : least;
        most = high[k] > most ? high[k] : most;
    }
    moments->count += (double)size;
    moments->total += all;
    moments->squares += all_squares;
    moments->low = least < moments->low ? least : moments->low;
    moments->high = most > moments->high ? most : moments->high;
    return 1;
}

/* The code of a value of a run that is not plain: zeros, Inf and NaN have codes to themselves. */
PART uint32_t code_of(uint32_t bits)
{
    uint32_t magnitude = bits & 0x7FFFFFFFu, code = bits >> CODE_SHIFT;

    if (magnitude > INF_BITS)
        return NAN_CODE;
    return magnitude && magnitude < 1u << CODE_SHIFT ? code + 1 : code;
}

PART void add_rare(const float *x, int64_t size, uint32_t *counts, Moments *moments)
{
    int64_t i;

    for (i = 0; i < size; i++) {
        uint32_t bits = bits_of(x[i]);
        double exact = x[i];
        counts[code_of(bits)]++;
        if ((bits & 0x7FFFFFFFu) >= INF_BITS)
            continue;
        moments->count += 1;
        moments->total += exact;
        moments->squares += exact * exact;
        moments->low = exact < moments->low ? exact : moments->low;
        moments->high = exact > moments->high ? exact : moments->high;
    }
}

PART void count_plain(const float *x, int64_t size, uint32_t (*tables)[CODES])
{
    int64_t i, whole = size - size % TABLES;

    for (i = 0; i < whole; i += TABLES) {
        if (i % LANES == 0) /* the next run, which memory brings meanwhile */
            PREFETCH(x + i + RUN);
        tables[0][bits_of(x[i]) >> CODE_SHIFT]++;
        tables[1][bits_of(x[i + 1]) >> CODE_SHIFT]++;
        tables[2][bits_of(x[i + 2]) >> CODE_SHIFT]++;
        tables[3][bits_of(x[i + 3]) >> CODE_SHIFT]++;
    }
    for (; i < size; i++)
        tables[0][bits_of(x[i]) >> CODE_SHIFT]++;
}

PART void begin(Moments *moments)
{
    moments->count = moments->total = moments->squares = 0;
    moments->low = INFINITY;
    moments->high = -INFINITY;
}

#if defined(_WIN32)
/* The linker wants this of every extension; nobody imports this one. */
EXPORT void *PyInit__engine(void)
{
    return 0;
}
#endif

/* To be raised with every change to a signature below: an object of another number is left alone. */
EXPORT int instrument_interface(void)
{
    return 9;
}

/* Add `size` values to int64 counts of 4096 codes and to count, sum, sum of squares, minimum and maximum. With a `stride`
 * above 1, codes of plain runs are counted of every so manieth value alone, into `sampled`, and what they are to stand for
 * is added to `found` behind the moments: zeros, and other values. */
WIDE EXPORT void instrument_accumulate(
    const void *data, int kind, int64_t size, int64_t stride, int64_t *codes, int64_t *sampled, double *found)
{
    uint32_t tables[TABLES][CODES], rare[CODES];
    float room[RUN];
    int64_t start = 0, end, next = 0, zeros = 0, others = 0, i;
    Moments moments;
    int code;

    begin(&moments);
    while (start < size) {
        /* Counts of 32 bits are added up before they can run over. */
        end = size - start > (1 << 30) ? start + (1 << 30) : size;
        memset(tables, 0, sizeof tables);
        memset(rare, 0, sizeof rare);
        for (; start < end; start += RUN) {
            int64_t length = end - start < RUN ? end - start : RUN;
            const float *x = run_of(data, kind, start, length, room);
            if (!add_plain(x, length, &moments)) {
                add_rare(x, length, rare, &moments);
            } else if (stride == 1) {
                count_plain(x, length, tables);
            } else {
                int32_t none = 0;
                for (i = 0; i < length; i++)
                    none += x[i] == 0;
                zeros += none;
                others += length - none;
                for (i = next - start; i < length; i += stride)
                    tables[0][bits_of(x[i]) >> CODE_SHIFT]++;
            }
            if (stride > 1)
                next += (start + length - next + stride - 1) / stride * stride;
        }
        start = end;
        for (code = 0; code < CODES; code++) {
            int64_t plain = (int64_t)tables[0][code] + tables[1][code] + tables[2][code] + tables[3][code];
            codes[code] += rare[code];
            *(stride == 1 ? codes + code : sampled + code) += plain;
        }
    }
    found[0] += moments.count;
    found[1] += moments.total;
    found[2] += moments.squares;
    found[3] = moments.low < found[3] ? moments.low : found[3];
    found[4] = moments.high > found[4] ? moments.high : found[4];
    if (stride > 1) {
        found[5] += (double)zeros;
        found[6] += (double)others;
    }
}

/* Which patterns of 16 bits occur, in their order, and how often: as many as are returned. Less than 2**32 values. The
 * two tables, which take turns, hold zeros before and after. */
EXPORT int64_t instrument_patterns(
    const void *data, int64_t size, uint32_t (*tables)[PATTERNS], uint16_t *present, int64_t *counts)
{
    const uint16_t *values = data;
    int64_t i, used = 0, whole = size - size % 4;
    int pattern, k;

    for (i = 0; i < whole; i += 4) {
        uint64_t four;
        memcpy(&four, values + i, sizeof four);
        if (four == (four & 0xFFFF) * 0x0001000100010001u) { /* a table waits for its last increment of one number */
            tables[0][four & 0xFFFF] += 4;
            continue;
        }
        tables[0][four & 0xFFFF]++;
        tables[1][four >> 16 & 0xFFFF]++;
        tables[0][four >> 32 & 0xFFFF]++;
        tables[1][four >> 48]++;
    }
    for (; i < size; i++)
        tables[0][values[i]]++;
    for (pattern = 0; pattern < PATTERNS; pattern += GLANCE) {
        uint32_t any = 0;
        for (k = pattern; k < pattern + GLANCE; k++)
            any |= tables[0][k] | tables[1][k];
        if (!any)
            continue;
        for (k = pattern; k < pattern + GLANCE; k++) {
            int64_t count = (int64_t)tables[0][k] + tables[1][k];
            if (!count)
                continue;
            tables[0][k] = tables[1][k] = 0;
            present[used] = (uint16_t)k;
            counts[used++] = count;
        }
    }
    return used;
}

typedef struct {
    double zeros, nans, infs;
} Special;

/* Note values of a code that stands for zeros, NaN or Inf. */
PART void note_special(Special *special, int code, double count)
{
    if (!(code & (SIGN - 1)))
        special->zeros += count;
    else if ((code & (SIGN - 1)) == INF_CODE)
        special->infs += count;
    else if ((code & (SIGN - 1)) > INF_CODE)
        special->nans += count;
}

/* The numbers of a sketch, in their order. */
PART void put_numbers(double *numbers, const Moments *moments, const Special *special)
{
    numbers[0] = moments->total;
    numbers[1] = moments->squares;
    numbers[2] = moments->low;
    numbers[3] = moments->high;
    numbers[4] = moments->count;
    numbers[5] = special->zeros;
    numbers[6] = special->nans;
    numbers[7] = special->infs;
    numbers[8] = 1;
}

/* The sketch of `size` values from `start` on: codes that occur and how often, as many as are returned; and sum, sum of
 * squares, minimum, maximum, count, zeros, NaN, Inf and share of the histogram. The first two tables hold zeros
 * before and after. */
PART int64_t sketch_one(
    const void *data, int kind, int64_t start, int64_t size, uint32_t (*tables)[CODES], float *room,
    uint16_t *codes, int64_t *counts, double *numbers)
{
    /* Fewer tables are sooner cleared and looked through; of a few values, only where they were counted. */
    int used_tables = size <= FEW ? 1 : size <= RUN ? 2 : TABLES, code, table, k;
    uint64_t places = size <= FEW ? 0 : ~(uint64_t)0; /* a bit for each `GLANCE` codes */
    int64_t used = 0, end = start + size, length;
    Special special = {0};
    Moments moments;

    begin(&moments);
    if (used_tables > 2)
        memset(tables[2], 0, (TABLES - 2) * sizeof tables[0]);
    for (; start < end; start += length) {
        const float *x;
        length = end - start < RUN ? end - start : RUN;
        x = run_of(data, kind, start, length, room);
        if (!add_plain(x, length, &moments)) {
            add_rare(x, length, tables[0], &moments);
            places = ~(uint64_t)0;
        } else if (used_tables > 2) {
            count_plain(x, length, tables);
        } else if (used_tables > 1) {
            for (k = 0; k < length - 1; k += 2) {
                tables[0][bits_of(x[k]) >> CODE_SHIFT]++;
                tables[1][bits_of(x[k + 1]) >> CODE_SHIFT]++;
            }
            for (; k < length; k++)
                tables[0][bits_of(x[k]) >> CODE_SHIFT]++;
        } else {
            for (k = 0; k < length; k++) {
                uint32_t found = bits_of(x[k]) >> CODE_SHIFT;
                tables[0][found]++;
                places |= (uint64_t)1 << found / GLANCE;
            }
        }
    }
    for (table = 2; table < used_tables; table++)
        for (code = 0; code < CODES; code++)
            tables[0][code] += tables[table][code];
    for (code = 0; code < CODES; code += GLANCE, places >>= 1) {
        uint32_t any = 0;
        if (!(places & 1))
            continue;
        for (k = code; k < code + GLANCE; k++)
            any |= tables[0][k] | tables[1][k];
        if (!any)
            continue;
        for (k = code; k < code + GLANCE; k++) {
            uint32_t count = tables[0][k] + tables[1][k];
            if (!count)
                continue;
            tables[0][k] = tables[1][k] = 0;
            codes[used] = (uint16_t)k;
            counts[used++] = count;
            note_special(&special, k, count);
        }
    }
    put_numbers(numbers, &moments, &special);
    return used;
}

/* Sketches of rows of int64 on the host: counts of codes, and behind them count, sum, sum of squares, minimum and maximum
 * in the bits of float64. A count that is NaN stands for what could not be measured. Returns how many codes there are. */
EXPORT int64_t instrument_rows(
    const int64_t *rows, int64_t many, int64_t width, uint16_t *codes, int64_t *counts, int64_t *ends, double *numbers)
{
    int64_t number, used = 0;
    int code, k;

    for (number = 0; number < many; number++, rows += width, numbers += FIELDS) {
        Special special = {0};
        Moments moments;
        int is_missing;
        memcpy(&moments, rows + CODES, sizeof moments);
        is_missing = isnan(moments.count);
        if (is_missing)
            begin(&moments);
        for (code = 0; code < CODES && !is_missing; code += GLANCE) {
            int64_t any = 0;
            for (k = code; k < code + GLANCE; k++)
                any |= rows[k];
            for (k = code; any && k < code + GLANCE; k++) {
                if (!rows[k])
                    continue;
                codes[used] = (uint16_t)k;
                counts[used++] = rows[k];
                note_special(&special, k, (double)rows[k]);
            }
        }
        ends[number] = used;
        put_numbers(numbers, &moments, &special);
    }
    return used;
}

/* The sketch of one tensor of less than 2^32 values; there is room for 4096 codes and counts. */
WIDE EXPORT int64_t instrument_sketch(
    const void *data, int kind, int64_t size, uint16_t *codes, int64_t *counts, double *numbers)
{
    uint32_t tables[TABLES][CODES];
    float room[RUN];

    memset(tables, 0, 2 * sizeof tables[0]);
    return sketch_one(data, kind, 0, size, tables, room, codes, counts, numbers);
}

/* Sketches of tensors that lie one behind the other, and where the codes of each end. Returns the number of codes in all,
 * of which there is room for as many as there are values. */
WIDE EXPORT int64_t instrument_sketches(
    const void *data, int kind, const int64_t *lengths, int64_t many,
    uint16_t *codes, int64_t *counts, int64_t *ends, double *numbers)
{
    uint32_t tables[TABLES][CODES];
    float room[RUN];
    int64_t tensor, start = 0, used = 0;

    memset(tables, 0, 2 * sizeof tables[0]);
    for (tensor = 0; tensor < many; tensor++) {
        used += sketch_one(
            data, kind, start, lengths[tensor], tables, room, codes + used, counts + used, numbers + tensor * FIELDS);
        ends[tensor] = used;
        start += lengths[tensor];
    }
    return used;
}

/* Floating point as whole numbers of the same order, with NaN of either sign beyond either infinity: their extremes are
 * found in whatever order, and the compiler makes vectors of that. The same function leads back. */
PART int32_t ordered(int32_t bits)
{
    return bits ^ ((bits >> 31) & 0x7FFFFFFF);
}

PART int32_t ordered_value(float value)
{
    return ordered((int32_t)bits_of(value));
}

typedef struct {
    int32_t low, high;
} Range;

/* The range of a run, and of what there was before. */
PART Range widened(Range range, const float *x, int64_t size)
{
    int32_t low = range.low, high = range.high;
    int64_t i;

    for (i = 0; i < size; i++) {
        int32_t value = ordered_value(x[i]);
        low = value < low ? value : low;
        high = value > high ? value : high;
    }
    range.low = low, range.high = high;
    return range;
}

/* The same element by element. */
PART void widen(int32_t *low, int32_t *high, const float *x, int64_t size)
{
    int64_t i;

    for (i = 0; i < size; i++) {
        int32_t value = ordered_value(x[i]);
        low[i] = value < low[i] ? value : low[i];
        high[i] = value > high[i] ? value : high[i];
    }
}

/* Smallest and largest value of each unit of samples, units and positions, NaN where one was NaN. Returns the mean square
 * of the values of every so many samples, units and positions. */
WIDE EXPORT double instrument_ranges(
    const void *data, int kind, int64_t samples, int64_t units, int64_t positions,
    int64_t every_sample, int64_t every_unit, int64_t every_position, int32_t *low, int32_t *high)
{
    const int32_t least = ordered_value(-INFINITY), most = ordered_value(INFINITY);
    float room[RUN];
    int32_t lows[RUN], highs[RUN];
    double squares = 0, looked_at = 0;
    int64_t width = units * positions, size = samples * width, start, length, i, k, row;

    for (i = 0; i < units; i++)
        low[i] = INT32_MAX, high[i] = INT32_MIN;
    if (positions > 1) {
        for (start = 0; start < size; start += length) {
            int64_t rest = positions - start % positions, unit = start / positions % units;
            Range range = {low[unit], high[unit]};
            length = rest < RUN ? rest : RUN;
            range = widened(range, run_of(data, kind, start, length, room), length);
            low[unit] = range.low, high[unit] = range.high;
        }
    } else if (width > RUN / 2) {
        for (row = 0; row < samples; row++)
            for (start = 0; start < width; start += RUN) {
                length = width - start < RUN ? width - start : RUN;
                widen(low + start, high + start, run_of(data, kind, row * width + start, length, room), length);
            }
    } else {
        /* Short rows side by side: a loop of a few elements takes longer to begin than to run. */
        int64_t together = RUN / width * width;
        for (i = 0; i < together; i++)
            lows[i] = INT32_MAX, highs[i] = INT32_MIN;
        for (start = 0; start < size; start += together) {
            length = size - start < together ? size - start : together;
            widen(lows, highs, run_of(data, kind, start, length, room), length);
        }
        for (start = 0; start < together; start += width)
            for (i = 0; i < width; i++) {
                low[i] = lows[start + i] < low[i] ? lows[start + i] : low[i];
                high[i] = highs[start + i] > high[i] ? highs[start + i] : high[i];
            }
    }
    for (i = 0; i < units; i++) {
        int is_nan = low[i] < least || high[i] > most;
        low[i] = is_nan ? (int32_t)NAN_BITS : ordered(low[i]);
        high[i] = is_nan ? (int32_t)NAN_BITS : ordered(high[i]);
    }
    for (row = 0; row < samples; row += every_sample)
        for (i = 0; i < units; i += every_unit)
            for (k = 0; k < positions; k += every_position) {
                double value = *run_of(data, kind, (row * units + i) * positions + k, 1, room);
                squares += value * value;
                looked_at += 1;
            }
    return squares / looked_at;
}

/* On how many of every `step`-th sample all positions of a unit were at most `below` or at least `above`. */
WIDE EXPORT void instrument_flat(
    const void *data, int kind, int64_t samples, int64_t units, int64_t positions,
    int64_t step, float below, float above, int64_t *flat)
{
    float room[RUN];
    int64_t width = units * positions, row, start, unit, i;

    for (unit = 0; unit < units; unit++)
        flat[unit] = 0;
    for (row = 0; row < samples; row += step) {
        for (start = 0; positions == 1 && start < width; start += RUN) {
            int64_t length = width - start < RUN ? width - start : RUN;
            const float *x = run_of(data, kind, row * width + start, length, room);
            for (i = 0; i < length; i++)
                flat[start + i] += (x[i] <= below) | (x[i] >= above);
        }
        for (unit = 0; positions > 1 && unit < units; unit++) {
            int32_t all = 1;
            for (start = 0; all && start < positions; start += RUN) {
                int64_t length = positions - start < RUN ? positions - start : RUN;
                const float *x = run_of(data, kind, (row * units + unit) * positions + start, length, room);
                for (i = 0; i < length; i++)
                    all &= (x[i] <= below) | (x[i] >= above);
            }
            flat[unit] += all;
        }
    }
}

/* Which rows are zero in whole, of either sign; returns how many. Nearly every row shows with its first value that it is
 * not. */
EXPORT int64_t instrument_zero_rows(const void *data, int kind, int64_t rows, int64_t width, uint8_t *is_zero)
{
    const uint16_t *narrow = data;
    const uint32_t *single = data;
    int64_t row, i, found = 0;

    for (row = 0; row < rows; row++) {
        int64_t start = row * width;
        if (kind == FLOAT32)
            for (i = 0; i < width && !(single[start + i] << 1); i++)
                ;
        else
            for (i = 0; i < width && !(narrow[start + i] & 0x7FFFu); i++)
                ;
        is_zero[row] = i == width;
        found += i == width;
    }
    return found;
}

/* The place of a value behind the first one. */
static const void *place_of(const void *data, int kind, int64_t start)
{
    return (const uint8_t *)data + start * (kind == FLOAT32 ? 4 : 2);
}

/* Ranges and scale of tensors that lie one behind the other, as of `instrument_ranges`; three numbers each in `cubes` and
 * `every`. */
EXPORT void instrument_ranges_of_many(
    const void *data, int kind, int64_t many, const int64_t *starts, const int64_t *cubes, const int64_t *every,
    int32_t *low, int32_t *high, double *squares)
{
    int64_t number;

    for (number = 0; number < many; number++, cubes += 3, every += 3) {
        squares[number] = instrument_ranges(
            place_of(data, kind, starts[number]), kind, cubes[0], cubes[1], cubes[2], every[0], every[1], every[2], low,
            high);
        low += cubes[1];
        high += cubes[1];
    }
}

/* How many rows of each of several tensors are zero in whole; there is room for the rows of one. */
EXPORT void instrument_zero_rows_in(
    const void *data, int kind, int64_t many, const int64_t *starts, const int64_t *rows, const int64_t *widths,
    uint8_t *room, int64_t *found)
{
    int64_t number;

    for (number = 0; number < many; number++)
        found[number] = instrument_zero_rows(
            place_of(data, kind, starts[number]), kind, rows[number], widths[number], room);
}

static uint8_t *put_varint(uint8_t *place, uint64_t number)
{
    for (; number > 0x7F; number >>= 7)
        *place++ = (uint8_t)(number | 0x80);
    *place++ = (uint8_t)number;
    return place;
}

static int64_t varint_size(uint64_t number)
{
    int64_t size = 1;
    for (; number > 0x7F; number >>= 7)
        size++;
    return size;
}

static uint8_t *put_bytes(uint8_t *place, const void *bytes, int64_t size)
{
    memcpy(place, bytes, (size_t)size);
    return place + size;
}

/* Histograms as entries of a serialised `Summary`, on a machine whose numbers are little endian as those are. `fields`
 * holds for each the bytes from its tag to the key of the histogram, which end at `field_ends`; `moments` five numbers
 * each, with the bytes of their keys; `limits` and `counts` end at `ends`. Returns the number of bytes, of which there is
 * room for 45 + 64 and the fields, limits and counts of each. */
EXPORT int64_t instrument_histograms(
    int64_t many, const uint8_t *fields, const int64_t *field_ends, const uint8_t *moments, const double *limits,
    const double *counts, const int64_t *ends, uint8_t *out)
{
    enum { MOMENTS = 45, VALUE = 0x0A, LIMITS = 0x32, COUNTS = 0x3A };
    int64_t number, field = 0, start = 0;
    uint8_t *place = out;

    for (number = 0; number < many; number++) {
        int64_t size = 8 * (ends[number] - start), field_size = field_ends[number] - field;
        int64_t length = MOMENTS + 2 * (1 + varint_size((uint64_t)size) + size);
        *place++ = VALUE;
        place = put_varint(place, (uint64_t)(field_size + varint_size((uint64_t)length) + length));
        place = put_bytes(place, fields + field, field_size);
        place = put_varint(place, (uint64_t)length);
        place = put_bytes(place, moments + number * MOMENTS, MOMENTS);
        *place++ = LIMITS;
        place = put_varint(place, (uint64_t)size);
        place = put_bytes(place, limits + start, size);
        *place++ = COUNTS;
        place = put_varint(place, (uint64_t)size);
        place = put_bytes(place, counts + start, size);
        start = ends[number], field = field_ends[number];
    }
    return place - out;
}

/* Bytes that lie at several addresses, one behind the other. */
EXPORT void instrument_gather(int64_t many, const uint64_t *addresses, const int64_t *sizes, uint8_t *out)
{
    int64_t number;

    for (number = 0; number < many; number++)
        out = put_bytes(out, (const void *)(uintptr_t)addresses[number], sizes[number]);
}

/* The cumulative distribution of one tensor: codes of finite values, rising, of which the negative ones are the last; how
 * often each occurs; and the extremes. Within a code, values are taken to be spread evenly. */
typedef struct {
    const uint16_t *codes;
    const int64_t *counts;
    int64_t size, negative;
    double low, high;
} Curve;

/* How far a search for rising values has come: the code that is looked at, in the order of values, and what is below. */
typedef struct {
    int64_t place;
    double before;
} Walk;

static int64_t index_of(const Curve *curve, int64_t place)
{
    return place < curve->negative ? curve->size - 1 - place : place - curve->negative;
}

static double value_of(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* The least magnitude of a code without sign, and the most. */
static double least_of(int bare)
{
    return bare <= 1 ? 0 : value_of((uint32_t)bare << CODE_SHIFT);
}

static double most_of(int bare)
{
    return bare == 0 ? 0 : bare == INF_CODE - 1 ? FLT_MAX : value_of((uint32_t)(bare + 1) << CODE_SHIFT);
}

/* Place of a code in the order of values. */
static int rank_of(int code)
{
    return code < SIGN ? SIGN + code : 2 * SIGN - code;
}

/* How many values are below one that is not zero, and not below that of the last search. */
static double below(const Curve *curve, Walk *walk, double value)
{
    double magnitude = value < 0 ? -value : value, left, right, share;
    int code = (int)(bits_of((float)(magnitude < FLT_MAX ? magnitude : FLT_MAX)) >> CODE_SHIFT), wanted, rank = 0;
    int64_t index = 0;

    wanted = SIGN + (value < 0 ? -1 : 1) * (code > 1 ? code : 1);
    for (; walk->place < curve->size; walk->place++) {
        index = index_of(curve, walk->place);
        rank = rank_of(curve->codes[index]);
        if (rank >= wanted)
            break;
        walk->before += (double)curve->counts[index];
    }
    if (walk->place == curve->size || rank != wanted)
        return walk->before;
    code = curve->codes[index];
    left = code < SIGN ? least_of(code) : -most_of(code & (SIGN - 1));
    right = code < SIGN ? most_of(code) : -least_of(code & (SIGN - 1));
    if (walk->place == 0)
        left = curve->low;
    if (walk->place == curve->size - 1)
        right = curve->high;
    left = left < curve->high ? left : curve->high;
    share = (value - left) / (right > left ? right - left : 1);
    share = share < 0 ? 0 : share > 1 ? 1 : share;
    return walk->before + (double)curve->counts[index] * share;
}

static Curve curve_of(
    int64_t number, const uint16_t *codes, const int64_t *counts, const int64_t *ends, const double *low, const double *high)
{
    int64_t start = number ? ends[number - 1] : 0, k;
    Curve curve = {codes + start, counts + start, ends[number] - start, 0, low[number], high[number]};

    for (k = curve.size; k > 0 && curve.codes[k - 1] >= SIGN; k--)
        curve.negative++;
    return curve;
}

/* Histograms of values between `edges`, of 1 and rising, of which the two in the middle are zero and hold the zeros
 * between them; see `histograms` in `histogram.py`. Returns the number of buckets in all, of which there is room for 67 a
 * tensor, with their right edges and counts, and where those of each tensor end; and gives three numbers for each: values,
 * zeros among them, and the least magnitude of the code of the smallest that is not zero. */
EXPORT int64_t instrument_buckets(
    int64_t many, const uint16_t *codes, const int64_t *counts, const int64_t *ends, const double *low, const double *high,
    const double *edges, double *limits, double *heights, int64_t *bucket_ends, double *numbers)
{
    enum { EDGES = 66, ZERO = 32 };
    int64_t number, used = 0, k;

    for (number = 0; number < many; number++) {
        Curve curve = curve_of(number, codes, counts, ends, low, high);
        Walk walk = {0, 0};
        double count = 0, zeros = 0, negatives = 0, previous = 0, most = curve.high;
        int smallest = INF_CODE - 1;

        most = -curve.low > most ? -curve.low : most;
        for (k = 0; k < curve.size; k++) {
            int code = curve.codes[k], bare = code & (SIGN - 1);
            double amount = (double)curve.counts[k];
            count += amount;
            zeros += bare ? 0 : amount;
            negatives += code > SIGN ? amount : 0;
            smallest = bare && bare < smallest ? bare : smallest;
        }
        for (k = 0; k < EDGES; k++) {
            double edge = most * edges[k], at;
            if (k == ZERO) {
                if (!(curve.low < 0 && (zeros > 0 || curve.high > 0)))
                    continue;
                at = negatives;
            } else if (k == ZERO + 1) {
                if (!(zeros > 0 && curve.high > 0))
                    continue;
                at = negatives + zeros;
            } else {
                if (!(edge > curve.low && edge < curve.high))
                    continue;
                at = rint(below(&curve, &walk, edge));
            }
            limits[used] = edge;
            heights[used++] = at - previous;
            previous = at;
        }
        limits[used] = curve.high;
        heights[used++] = count - previous;
        bucket_ends[number] = used;
        numbers[3 * number] = count;
        numbers[3 * number + 1] = zeros;
        numbers[3 * number + 2] = least_of(smallest);
    }
    return used;
}

/* Histograms of magnitudes: of each tensor the counts between `many_edges` rising ones, the first and the last of which
 * hold all that is not zero between them. */
EXPORT void instrument_magnitudes(
    int64_t many, const uint16_t *codes, const int64_t *counts, const int64_t *ends, const double *low, const double *high,
    const double *edges, int64_t many_edges, double *heights)
{
    int64_t number, k;

    for (number = 0; number < many; number++, edges += many_edges, heights += many_edges - 1) {
        Curve curve = curve_of(number, codes, counts, ends, low, high);
        Walk up = {0, 0}, down = {0, 0};
        double count = 0, zeros = 0, previous = 0;

        for (k = 0; k < curve.size; k++) {
            double amount = (double)curve.counts[k];
            count += amount;
            zeros += curve.codes[k] & (SIGN - 1) ? 0 : amount;
        }
        /* What lies beyond on the other side of zero, from the largest magnitude on, so that values rise there too. */
        for (k = many_edges - 2; k > 0; k--)
            heights[k - 1] = below(&curve, &down, -edges[k]);
        for (k = 1; k < many_edges - 1; k++) {
            double at = rint(below(&curve, &up, edges[k]) - heights[k - 1] - zeros);
            heights[k - 1] = at - previous;
            previous = at;
        }
        heights[many_edges - 2] = count - zeros - previous;
    }
}

/* Numbers from 0 in half bytes: three bits each and one that says whether more follow, the lowest first. */
typedef struct {
    uint8_t *bytes;
    int64_t halves;
} Halves;

static void put_number(Halves *to, uint64_t number)
{
    for (;;) {
        uint8_t half = (uint8_t)(number & 7);
        number >>= 3;
        half |= number ? 8 : 0;
        if (to->halves & 1)
            to->bytes[to->halves >> 1] |= (uint8_t)(half << 4);
        else
            to->bytes[to->halves >> 1] = half;
        to->halves++;
        if (!number)
            return;
    }
}

static uint64_t next_number(const uint8_t *bytes, int64_t *halves)
{
    uint64_t number = 0;
    int shift = 0;

    for (;; shift += 3) {
        uint8_t half = (uint8_t)(bytes[*halves >> 1] >> (*halves & 1 ? 4 : 0));
        ++*halves;
        number |= (uint64_t)(half & 7) << shift;
        if (!(half & 8))
            return number;
    }
}

/* Sketches in few bytes: of each the number of its codes, and of each code how far it lies behind the last one, and its
 * count. Every `part` sketches a part begins, at a byte of its own, and `out_ends` is where each ends. There is room for 8
 * bytes a sketch and 14 a code. */
EXPORT void instrument_pack(int64_t many, int64_t part, const uint16_t *codes, const int64_t *counts,
    const int64_t *ends, uint8_t *out, int64_t *out_ends)
{
    Halves to = {out, 0};
    int64_t number, start = 0, k;

    for (number = 0; number < many; start = ends[number++]) {
        int last = -1;
        if (number % part == 0)
            to.halves += to.halves & 1;
        put_number(&to, (uint64_t)(ends[number] - start));
        for (k = start; k < ends[number]; k++) {
            put_number(&to, (uint64_t)(codes[k] - last - 1));
            put_number(&to, (uint64_t)(counts[k] - 1));
            last = codes[k];
        }
        out_ends[number / part] = (to.halves + 1) / 2;
    }
}

/* The sketches that `instrument_pack` was given. */
EXPORT void instrument_unpack(int64_t many, const uint8_t *bytes, uint16_t *codes, int64_t *counts, int64_t *ends)
{
    int64_t number, halves = 0, used = 0;

    for (number = 0; number < many; number++) {
        int64_t size = (int64_t)next_number(bytes, &halves);
        int code = -1;
        for (; size > 0; size--) {
            code += (int)next_number(bytes, &halves) + 1;
            codes[used] = (uint16_t)code;
            counts[used++] = (int64_t)next_number(bytes, &halves) + 1;
        }
        ends[number] = used;
    }
}
