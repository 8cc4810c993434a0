// Loads the plugin library as TensorRT does and takes one node through its life:
//   drive PLUGIN.so IN OUT   B L S H D M dtype   feature_map flow_axis competition_axis
//                            eps outer_eps causal clamped low high
// IN holds q, k, v one after the other; OUT gets the result. Prints what the plugin says.
#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <vector>

using namespace nvinfer1;

struct Logger : ILogger, ILoggerFinder {
  void log(Severity, const char* text) noexcept override { std::printf("said %s\n", text); }
  ILogger* findLogger() override { return this; }
};

int fail(const char* what) {
  std::printf("failed %s\n", what);
  return 1;
}

int main(int argc, char** argv) {
  if (argc != 20) return fail("usage");
  void* library = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) return fail(dlerror());
  auto set = reinterpret_cast<void (*)(ILoggerFinder*)>(dlsym(library, "setLoggerFinder"));
  auto get = reinterpret_cast<IPluginCreatorInterface* const* (*)(int32_t&)>(
      dlsym(library, "getCreators"));
  if (set == nullptr || get == nullptr) return fail("exports");
  Logger logger;
  set(&logger);
  int32_t count = 0;
  auto* creator = dynamic_cast<IPluginCreatorV3One*>(get(count)[0]);
  if (count != 1 || creator == nullptr) return fail("creators");
  std::printf("name %s::%s %s\n", creator->getPluginNamespace(), creator->getPluginName(),
              creator->getPluginVersion());

  const float eps = std::strtof(argv[14], nullptr), outer = std::strtof(argv[15], nullptr);
  const int32_t causal = std::atoi(argv[16]);
  const float clamp[2] = {std::strtof(argv[18], nullptr), std::strtof(argv[19], nullptr)};
  std::vector<PluginField> fields = {
      {"feature_map", argv[11], PluginFieldType::kCHAR, int32_t(std::strlen(argv[11]))},
      {"flow_axis", argv[12], PluginFieldType::kCHAR, int32_t(std::strlen(argv[12]))},
      {"competition_axis", argv[13], PluginFieldType::kCHAR, int32_t(std::strlen(argv[13]))},
      {"eps", &eps, PluginFieldType::kFLOAT32, 1},
      {"outer_eps", &outer, PluginFieldType::kFLOAT32, 1},
      {"causal", &causal, PluginFieldType::kINT32, 1}};
  if (std::atoi(argv[17])) fields.emplace_back("clamp", clamp, PluginFieldType::kFLOAT32, 2);
  PluginFieldCollection collection = {int32_t(fields.size()), fields.data()};
  IPluginV3* built = creator->createPlugin("node", &collection, TensorRTPhase::kBUILD);
  if (built == nullptr) return fail("createPlugin");

  int64_t n[6];
  for (int i = 0; i < 6; ++i) n[i] = std::atoll(argv[4 + i]);
  const DataType type = DataType(std::atoi(argv[10]));
  const size_t size = type == DataType::kFLOAT ? 4 : 2;
  const Dims q = {4, {n[0], n[1], n[3], n[4]}}, k = {4, {n[0], n[2], n[3], n[4]}},
             v = {4, {n[0], n[2], n[3], n[5]}}, o = {4, {n[0], n[1], n[3], n[5]}};
  DynamicPluginTensorDesc dynamic[4];
  PluginTensorDesc desc[4];
  const Dims* shapes[4] = {&q, &k, &v, &o};
  for (int i = 0; i < 4; ++i) {
    desc[i] = {*shapes[i], type, TensorFormat::kLINEAR, 1.0f};
    dynamic[i] = {desc[i], *shapes[i], *shapes[i], *shapes[i]};
    dynamic[i].max.d[0] *= 2;  // the profile's maximum is not the shape that runs
  }
  auto* build = static_cast<IPluginV3OneBuild*>(
      built->getCapabilityInterface(PluginCapabilityType::kBUILD));
  for (int i = 0; i < 4; ++i)
    if (!build->supportsFormatCombination(i, dynamic, 3, 1)) return fail("format");
  if (build->configurePlugin(dynamic, 3, dynamic + 3, 1) != 0) return fail("configurePlugin");
  const size_t bytes = build->getWorkspaceSize(dynamic, 3, dynamic + 3, 1);
  IDimensionExpr dims[12];
  DimsExprs in[3], result;
  for (int i = 0; i < 3; ++i) {
    in[i].nbDims = 4;
    for (int j = 0; j < 4; ++j) in[i].d[j] = &dims[4 * i + j];
  }
  IExprBuilder expressions;
  if (build->getOutputShapes(in, 3, nullptr, 0, &result, 1, expressions) != 0 ||
      result.d[1] != &dims[1] || result.d[3] != &dims[11])
    return fail("getOutputShapes");

  // What an engine keeps, then a plugin made from it in another process: a deep copy here.
  auto* first = static_cast<IPluginV3OneRuntime*>(
      built->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
  const PluginFieldCollection* kept = first->getFieldsToSerialize();
  std::vector<std::vector<char>> data;
  std::vector<PluginField> copies;
  for (int i = 0; i < kept->nbFields; ++i) {
    const PluginField& f = kept->fields[i];
    const size_t width = f.type == PluginFieldType::kCHAR ? 1 : 4;
    const char* p = static_cast<const char*>(f.data);
    data.emplace_back(p, p + width * f.length);
    copies.push_back(f);
  }
  for (size_t i = 0; i < copies.size(); ++i) copies[i].data = data[i].data();
  PluginFieldCollection loaded = {int32_t(copies.size()), copies.data()};
  delete built;
  IPluginV3* plugin = creator->createPlugin("node", &loaded, TensorRTPhase::kRUNTIME);
  if (plugin == nullptr) return fail("createPlugin at run time");
  auto* run = static_cast<IPluginV3OneRuntime*>(
      plugin->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
  IPluginV3* attached = run->attachToContext(nullptr);
  run = static_cast<IPluginV3OneRuntime*>(
      attached->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
  if (run->onShapeChange(desc, 3, desc + 3, 1) != 0) return fail("onShapeChange");
  std::ifstream file(argv[2], std::ios::binary);
  std::vector<char> input((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  const size_t q_bytes = n[0] * n[1] * n[3] * n[4] * size, k_bytes = n[0] * n[2] * n[3] * n[4] * size;
  const void* inputs[3] = {input.data(), input.data() + q_bytes, input.data() + q_bytes + k_bytes};
  std::vector<char> output(n[0] * n[1] * n[3] * n[5] * size);
  void* outputs[1] = {output.data()};
  void* workspace = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  if (run->enqueue(desc, desc + 3, inputs, outputs, workspace, nullptr) != 0) return fail("enqueue");
  std::ofstream(argv[3], std::ios::binary).write(output.data(), output.size());
  std::free(workspace);
  delete attached;
  delete plugin;
  std::printf("done\n");
  return 0;
}
