/* XBZRLE of many pages (ram.md part 6), without Python.h: called through ctypes, which releases the GIL. */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

static size_t put_number(uint8_t *out, size_t number)
{
    if (number < 0x80) {
        out[0] = (uint8_t)number;
        return 1;
    }
    out[0] = (uint8_t)(number | 0x80);
    out[1] = (uint8_t)(number >> 7);
    return 2;
}

/* The number of equal bytes at the begin. */
static size_t equal_run(const uint8_t *a, const uint8_t *b, size_t size)
{
    size_t i = 0;
    uint64_t x, y;
    for (; i + 8 <= size; i += 8) {
        memcpy(&x, a + i, 8);
        memcpy(&y, b + i, 8);
        if (x != y)
            break;
    }
    while (i < size && a[i] == b[i])
        i++;
    return i;
}

/* The number of different bytes at the begin. */
static size_t different_run(const uint8_t *a, const uint8_t *b, size_t size)
{
    const uint64_t ones = 0x0101010101010101ULL, tops = ones << 7;
    size_t i = 0;
    uint64_t x, y;
    for (; i + 8 <= size; i += 8) {
        memcpy(&x, a + i, 8);
        memcpy(&y, b + i, 8);
        x ^= y;
        if ((x - ones) & ~x & tops)
            break;
    }
    while (i < size && a[i] != b[i])
        i++;
    return i;
}

/* The length of the delta in out, which has room for a page; 0 for equal pages, -1 if it would be longer than the page. */
static int32_t encode(const uint8_t *before, const uint8_t *after, size_t page, uint8_t *out)
{
    size_t i = 0, used = 0;
    while (i < page) {
        if (used + 2 > page)
            return -1;
        size_t equal = equal_run(before + i, after + i, page - i);
        i += equal;
        if (i == page)
            break;
        used += put_number(out + used, equal);
        size_t different = different_run(before + i, after + i, page - i);
        if (used + 2 > page)
            return -1;
        used += put_number(out + used, different);
        if (used + different > page)
            return -1;
        memcpy(out + used, after + i, different);
        used += different;
        i += different;
    }
    return (int32_t)used;
}

/* Each delta begins in out where the page of the same number would begin. */
void trimig_xbzrle_encode(const uint8_t *before, const uint8_t *after, size_t count, size_t page, uint8_t *out, int32_t *lengths)
{
    for (size_t k = 0; k < count; k++)
        lengths[k] = encode(before + k * page, after + k * page, page, out + k * page);
}
