// The C++ tests, meant for builds with sanitizers: what the Python tests prove of the numbers is
// proved here of memory and threads, over the same odd shapes.
#include "check.h"

namespace bitwright_tests {

void parallel();
void codes();
void scales();
void sums();
void factors();
void solve();
void awq();
void linear();
void packed();
void block();
void large();

}  // namespace bitwright_tests

int main() {
  using namespace bitwright_tests;  // NOLINT
  const struct {
    const char* name;
    void (*run)();
  } tests[] = {{"parallel", parallel}, {"codes", codes}, {"scales", scales}, {"sums", sums},
               {"factors", factors},   {"solve", solve}, {"awq", awq},       {"linear", linear},
               {"packed", packed},     {"block", block}, {"large", large}};
  for (const auto& test : tests) {
    const int before = passed.load();
    try {
      test.run();
    } catch (const std::exception& error) {
      failed.fetch_add(1);
      std::printf("%s: %s\n", test.name, error.what());
    }
    std::printf("%-9s %5d checks at %s\n", test.name, passed.load() - before, table().isa);
  }
  std::printf("%d passed, %d failed\n", passed.load(), failed.load());
  return failed.load() == 0 ? 0 : 1;
}
