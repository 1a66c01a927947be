// Nothing runs machine code here: the compiler is asked, as devices ask it, and a kernel that is built ahead serves. Of
// those the simulator has more than devices (CMakeLists.txt).
#include "cuda/compiled.cuh"

#include <utility>

namespace llmengine::cuda {

static Compiler compiler;

void set_compiler(Compiler given) { compiler = std::move(given); }

std::vector<std::string> take_launched() { return {}; }

bool launch_instance(const LaunchSite&, const Instance& instance, void**) {
  if (compiler) compiler(instance, 90);
  return false;
}

}  // namespace llmengine::cuda
